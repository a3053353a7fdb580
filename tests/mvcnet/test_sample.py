import json
from pathlib import Path

import mne
import numpy as np
from scipy.stats import norm

from diptych_mvcnet import sample
from diptych_mvcnet.sample import generate_sample, write_sample


def test_the_sample_has_the_promised_form_and_balanced_classes() -> None:
    made = generate_sample(n_subjects=2)
    assert made.x.shape == (96, 21, 300)
    assert made.x.dtype == np.float32
    for subject in (1, 2):
        for session in (1, 2):
            chosen = (made.subject == subject) & (made.session == session)
            assert np.bincount(made.y[chosen]).tolist() == [12, 12]


def test_the_left_source_is_seen_as_the_spherical_model_says() -> None:
    row = [sample.CHANNELS.index(name) for name in ("C5", "C3", "C1", "Cz", "C2", "C4", "C6")]
    seen = sample.lead_field()[row, 0]
    np.testing.assert_allclose(seen, [0.71, 0.41, 0.22, 0.10, 0.03, -0.04, -0.11], atol=0.006)


def test_the_bayes_accuracy_is_the_formula_and_is_reached_by_the_amplitudes() -> None:
    made = generate_sample(n_subjects=3, n_sessions=2, n_per_session=200)
    formula = np.mean([norm.cdf(-np.log(1 - e) / (0.25 * np.sqrt(2))) for e in made.erd])
    assert made.bayes_accuracy == formula
    best = (made.amplitudes[:, 1] > made.amplitudes[:, 0]) == made.y
    assert abs(best.mean() - formula) < 4 * np.sqrt(formula * (1 - formula) / len(best))


def test_more_subjects_leave_the_first_ones_as_they_were() -> None:
    few, many = generate_sample(3, n_subjects=1), generate_sample(3, n_subjects=2)
    assert np.array_equal(few.x, many.x[: len(few.x)])
    assert not np.array_equal(few.x, generate_sample(4, n_subjects=1).x)


def test_imagery_weakens_the_rhythm_of_the_other_side() -> None:
    made = generate_sample(n_subjects=3)
    power = np.log(mne.filter.filter_data(made.x.astype(float), 100, 8, 14, verbose=False).var(-1))
    left, right = made.ch_names.index("C5"), made.ch_names.index("C6")
    lateral = power[:, left] - power[:, right]
    assert lateral[made.y == 0].mean() > lateral[made.y == 1].mean() + 0.2


def test_the_files_hold_the_trials_of_the_arrays(tmp_path: Path) -> None:
    write_sample(tmp_path, 5, n_subjects=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "sub-01_ses-1_raw.fif"
    assert len(names) == 5
    made = generate_sample(5, n_subjects=2)
    raw = mne.io.read_raw_fif(tmp_path / "sub-02_ses-1_raw.fif", preload=True, verbose=False)
    events, codes = mne.events_from_annotations(raw, verbose=False)
    chosen = (made.subject == 2) & (made.session == 1)
    assert [codes["left_hand"] if y == 0 else codes["right_hand"] for y in made.y[chosen]] == list(
        events[:, 2]
    )
    third = raw.get_data(start=events[2, 0], stop=events[2, 0] + 300) * 1e6
    np.testing.assert_allclose(third, made.x[chosen][2], rtol=1e-5, atol=1e-4)
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert truth["bayes_accuracy"] == made.bayes_accuracy
