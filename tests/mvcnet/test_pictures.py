import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from diptych import artifacts
from diptych.run import open_folder, open_prepared
from diptych_mvcnet.patterns import haufe_patterns
from diptych_mvcnet.pictures import _artefacts, _calibration, _confusion, _responses

NAMES = (
    *("accuracy-by-participant", "confusion", "calibration", "patterns", "kernels"),
    *("spectra", "artefacts"),
)


def test_a_run_has_every_picture_with_words_and_no_file_is_empty(causal_run: Path) -> None:
    folder = causal_run / "evaluation" / "pictures"
    listed = json.loads((folder / "pictures.json").read_text())
    assert tuple(entry["name"] for entry in listed) == NAMES
    for entry in listed:
        assert (folder / entry["file"]).stat().st_size > 2000
        assert len(entry["caption"]) > 40


def test_a_pattern_finds_its_source_where_the_filter_does_not() -> None:
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((6, 3))
    sources = draw.standard_normal((40, 3, 500)) * np.array([1.0, 4.0, 4.0])[:, None]
    x = np.einsum("cs,nst->nct", mixing, sources) + 0.01 * draw.standard_normal((40, 6, 500))
    covariance = np.cov(x.transpose(1, 0, 2).reshape(6, -1))
    filters = np.linalg.solve(covariance, mixing[:, :1]).T

    def likeness(row: np.ndarray) -> float:
        cosine = row @ mixing[:, 0] / np.linalg.norm(row) / np.linalg.norm(mixing[:, 0])
        return float(abs(cosine))

    assert likeness(haufe_patterns(filters, x)[0]) > 0.999
    assert likeness(filters[0]) < 0.9


def test_the_confusion_counts_every_trial() -> None:
    payload = {
        "y": np.array([0, 0, 0, 1]),
        "probability": np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]]),
    }
    figure = _confusion(payload, {"classes": ["left_hand", "right_hand"]}).figure
    words = {text.get_text() for text in figure.axes[0].texts}
    assert words == {"67%\n2", "33%\n1", "0%\n0", "100%\n1"}


def test_the_calibration_shows_the_accuracy_of_each_confidence() -> None:
    confidence = np.repeat([0.6, 0.9], 50)
    right = np.concatenate([np.arange(50) < 30, np.arange(50) < 45])
    payload = {
        "y": np.where(right, 0, 1),
        "probability": np.stack([confidence, 1 - confidence], axis=1),
    }
    figure = _calibration(payload).figure
    shown = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(np.asarray(shown.get_xydata(), float), [[0.6, 0.6], [0.9, 0.9]])


def test_a_kernel_of_12_hertz_passes_12_hertz() -> None:
    time = np.arange(-12, 13) / 100.0
    kernels = np.cos(2 * np.pi * 12 * time)[None] * np.hanning(25)
    network = {"kernels": kernels, "importance": np.ones(1)}
    facts = {"sfreq": 100.0, "filter": {"band": None}}
    line = _responses(network, facts).figure.axes[0].lines[-1]
    peak = np.asarray(line.get_xdata())[np.argmax(line.get_ydata())]
    assert peak == pytest.approx(12, abs=0.5)


def test_a_suspicious_region_is_orange_and_a_missing_one_says_why() -> None:
    rows = [
        ("central channels alone", 3, 0.9, 0.6, True, ""),
        ("frontal channels alone", 0, None, None, None, "no such channel"),
        ("temporal channels alone", 2, 0.8, 0.6, True, ""),
    ]
    columns = ["source", "channels", "accuracy", "chance_bound", "above_chance", "note"]
    picture = _artefacts(pl.DataFrame(rows, schema=columns, orient="row"))
    assert picture is not None
    central, temporal = picture.figure.axes[0].patches
    assert central.get_facecolor() != temporal.get_facecolor()
    assert "no such channel" in {text.get_text() for text in picture.figure.axes[0].texts}


@pytest.mark.slow
def test_the_networks_patterns_lie_over_the_simulated_sources(tmp_path: Path) -> None:
    from diptych import verbs
    from diptych.config import load
    from diptych_mvcnet.config import MVCNetConfig
    from diptych_mvcnet.pipeline import PIPELINE

    config = load(MVCNetConfig, recipe="demo", sets=["evaluate.baselines=[]", "run.device=cpu"])
    run = verbs.demo(PIPELINE, tmp_path / "demo", config, 0)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert 0.80 <= results["methods"]["mvcnet"]["accuracy"]["value"] <= 0.96
    facts = open_prepared(open_folder(run)).facts
    with np.load(run / "evaluation" / "network.npz") as network:
        patterns = network["patterns"]
    for source in ("C3", "C4"):
        seen = np.array(facts["sources"][source])
        norms = np.linalg.norm(patterns, axis=1) * np.linalg.norm(seen)
        assert np.abs(patterns @ seen / norms).max() >= 0.8
    assert artifacts.load(run / "fits" / "final" / "artifacts")["alignment"]
