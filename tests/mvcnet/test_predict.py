from pathlib import Path

import mne
import numpy as np
import polars as pl
import pytest

import diptych
from diptych.errors import DataError, UsageError
from diptych_mvcnet.pipeline import PIPELINE


def opened(run: Path) -> diptych.Run:
    return diptych.open_run(run, PIPELINE)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    from diptych_mvcnet.sample import write_sample

    write_sample(tmp_path / "new", 9, n_subjects=1)
    return tmp_path / "new" / "sub-01_ses-1_raw.fif"


def test_every_cued_trial_of_a_new_recording_gets_a_row(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pred.csv"
    findings = opened(causal_run).predict(stranger, out)
    assert not findings.errors
    table = pl.read_csv(out)
    assert table.columns == [
        *("recording", "trial", "onset_s", "p_left_hand", "p_right_hand", "label", "confidence"),
        *("aligned_with", "n_seen", "flag"),
    ]
    assert table.height == 24
    assert set(table["recording"]) == {"sub-01_ses-1_raw.fif"}
    assert table["onset_s"].to_list() == [2.0 + 4.0 * trial for trial in range(24)]
    assert table["n_seen"].to_list() == list(range(1, 25))
    assert set(table["aligned_with"]) == {"online"}
    np.testing.assert_allclose(table["p_left_hand"] + table["p_right_hand"], 1.0)
    expected = np.where(table["p_left_hand"] >= table["p_right_hand"], "left_hand", "right_hand")
    assert table["label"].to_list() == expected.tolist()
    assert table["flag"].to_list() == ["warmup"] * 4 + [None] * 20


def test_later_trials_change_no_earlier_prediction(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    raw = mne.io.read_raw_fif(stranger, preload=True, verbose=False)
    raw.crop(0, 45).save(tmp_path / "first_raw.fif", verbose=False)
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    opened(causal_run).predict(stranger, whole)
    opened(causal_run).predict(tmp_path / "first_raw.fif", part)
    first = pl.read_csv(part)
    assert 5 < first.height < 24
    np.testing.assert_allclose(
        pl.read_csv(whole)["p_left_hand"][: first.height], first["p_left_hand"], atol=1e-6
    )


def test_without_cues_windows_follow_each_other(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    raw = mne.io.read_raw_fif(stranger, preload=True, verbose=False)
    raw.set_annotations(None).crop(0, 20 - 0.01).save(tmp_path / "rest_raw.fif", verbose=False)
    out = tmp_path / "pred.csv"
    opened(causal_run).predict(tmp_path / "rest_raw.fif", out)
    onset = pl.read_csv(out)["onset_s"].to_list()
    assert onset == [0.5 * step for step in range(37)]


def test_the_mode_of_alignment_can_be_chosen(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    out = tmp_path / "block.csv"
    opened(causal_run).predict(stranger, out, {"align.test": "block"})
    table = pl.read_csv(out)
    assert set(table["aligned_with"]) == {"block"}
    assert set(table["n_seen"]) == {24}
    with pytest.raises(UsageError, match=r"align\.test=online"):
        opened(causal_run).predict(stranger, tmp_path / "train.csv", {"align.test": "train"})


def test_several_inputs_give_the_good_ones_and_name_the_misfit(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    raw = mne.io.read_raw_fif(stranger, preload=True, verbose=False)
    raw.drop_channels(["C3"]).save(stranger.parent / "lacking_raw.fif", verbose=False)
    out = tmp_path / "pred.csv"
    with pytest.raises(DataError) as caught:
        opened(causal_run).predict(stranger.parent, out)
    findings = caught.value.findings
    assert findings is not None
    assert [f.code for f in findings.errors] == ["model.mismatch"]
    assert findings.errors[0].where == "lacking_raw.fif"
    assert "C3" in findings.errors[0].found
    assert set(pl.read_csv(out)["recording"]) == {
        "sub-01_ses-1_raw.fif",
        "sub-01_ses-2_raw.fif",
    }


def test_what_a_refused_prediction_recommends_can_be_done(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    raw = mne.io.read_raw_fif(stranger, preload=True, verbose=False)
    raw.info["subject_info"] = {"last_name": "Doe"}
    raw.drop_channels(["C3"]).save(tmp_path / "lacking_raw.fif", verbose=False)
    run, source = opened(causal_run), tmp_path / "lacking_raw.fif"
    with pytest.raises(DataError, match="no prediction was written") as caught:
        run.predict(source, tmp_path / "a.csv")
    assert "data.exclude" not in str(caught.value)
    assert caught.value.findings is not None
    assert "data.interpolate=true" in caught.value.findings.errors[0].fix
    found = run.predict(source, tmp_path / "b.csv", {"data.interpolate": True})
    assert all("anonymise" not in finding.fix for finding in found)
    assert set(pl.read_csv(tmp_path / "b.csv")["flag"]) == {
        "channel_interpolated;warmup",
        "channel_interpolated",
    }
    raw.rename_channels({"Cz": "Middle"}).save(tmp_path / "other_raw.fif", verbose=False)
    values = {"data.interpolate": True, "data.rename": {"Middle": "Cz"}}
    run.predict(tmp_path / "other_raw.fif", tmp_path / "c.csv", values)
    assert (tmp_path / "b.csv").read_text() == (tmp_path / "c.csv").read_text().replace(
        "other_raw", "lacking_raw"
    )


def test_nothing_is_written_where_no_recording_fits(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    x = np.zeros((2, 21, 99), dtype=np.float32)
    raw = mne.io.read_raw_fif(stranger, verbose=False)
    np.savez(tmp_path / "short.npz", X=x, ch_names=raw.ch_names, sfreq=80.0)
    with pytest.raises(DataError) as caught:
        opened(causal_run).predict(tmp_path / "short.npz", tmp_path / "pred.csv")
    assert caught.value.findings is not None
    (finding,) = caught.value.findings.errors
    assert finding.code == "model.mismatch"
    assert "99 samples" in finding.found
    assert not (tmp_path / "pred.csv").exists()


def test_an_unknown_subject_or_an_empty_folder_is_refused(
    causal_run: Path, stranger: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="one model for all subjects"):
        opened(causal_run).predict(stranger, tmp_path / "a.csv", {"predict.subject": "S-1"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no recording"):
        opened(causal_run).predict(tmp_path / "empty", tmp_path / "b.csv")


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_the_exported_graph_decodes_as_the_model(
    causal_run: Path, tmp_path: Path, form: str
) -> None:
    import torch

    from diptych import verbs
    from diptych_mvcnet.align import apply_alignment, fit_alignment
    from diptych_mvcnet.evaluate import probabilities

    out = verbs.export(PIPELINE, causal_run, form, tmp_path / f"decoder.{form}")
    draw = np.random.default_rng(1)
    x = (10 * draw.standard_normal((7, 21, 160))).astype(np.float32)
    alignment = fit_alignment(x)
    whitener = alignment.whitener.astype(np.float32)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out)
        assert [one.name for one in session.get_inputs()] == ["x", "whitener"]
        (logits,) = session.run(["logits"], {"x": x, "whitener": whitener})
    else:
        graph = torch.export.load(out).module()
        logits = graph(torch.from_numpy(x), torch.from_numpy(whitener)).detach().numpy()
    expected = probabilities(
        opened(causal_run).model["model"], apply_alignment(x, alignment).astype(np.float32)
    )
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
