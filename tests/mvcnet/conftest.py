"""One small trained run that the tests of evaluation, prediction and streaming share."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diptych_mvcnet.sample import write_sample

    folder = tmp_path_factory.mktemp("recordings")
    write_sample(folder, 0, n_subjects=2)
    return folder


@pytest.fixture(scope="session")
def causal_run(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import diptych
    from diptych_mvcnet.pipeline import PIPELINE

    torch.set_num_threads(1)
    overrides = {
        "data.filter.phase": "causal",
        "data.resample_hz": 80,
        "data.window": [0.5, 2.5],
        "data.window_step_s": 0.5,
        "model.cnn.filters": 8,
        "model.transformer.embed_dim": 16,
        "train.epochs": 4,
        "evaluate.baselines": ["csp_lda", "majority", "ifnet"],
        "run.device": "cpu",
    }
    out = tmp_path_factory.mktemp("run") / "run"
    diptych.train(PIPELINE, recordings, out, recipe="demo", overrides=overrides)
    return out
