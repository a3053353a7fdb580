"""A run keeps none of the user's paths, and goes on where they are not needed or given again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from diptych.config import load, merge
from diptych.errors import UsageError
from diptych.run import RunFolder, for_other_data, portable, stored_config
from diptych.training import Job, check_source, open_job
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.pipeline import PIPELINE


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for subject in ("mueller", "meier"):
        np.savez(
            tmp_path / "data" / f"{subject}.npz",
            X=draw.normal(0, 20, (40, 3, 100)).astype(np.float32),
            y=np.arange(40) % 2,
            ch_names=np.array(["C3", "Cz", "C4"]),
            sfreq=100.0,
        )
    files = "".join(f"{name}.npz,{name}\n" for name in ("mueller", "meier"))
    (tmp_path / "files.csv").write_text("path,subject\n" + files)
    (tmp_path / "split.csv").write_text("subject,split\nmueller,train\nmeier,test\n")
    (tmp_path / "key").write_bytes(b"secret")
    return tmp_path / "data"


def config(folder: Path) -> MVCNetConfig:
    values = {
        "data.manifest": folder / "files.csv",
        "split.file": folder / "split.csv",
        "run.pseudonym_key": folder / "key",
    }
    sets = [f"{key}={value}" for key, value in values.items()]
    return load(MVCNetConfig, sets=["split.kind=fixed", "data.resample_hz=null", *sets])


def opened(data: Path, config: MVCNetConfig | None, *, join: bool) -> Job:
    folder = RunFolder(data.parent / "run")
    return open_job(PIPELINE, data, folder, config, join=join, command="")


def test_a_run_holds_no_path_and_goes_on_elsewhere(data: Path) -> None:
    before = opened(data, config(data.parent), join=False)
    text = (before.folder.path / "config.yaml").read_text()
    for word in (str(data.parent), "split.csv", "files.csv", "mueller", "secret"):
        assert word not in text
    moved = data.parent / "elsewhere"
    moved.mkdir()
    for name in ("files.csv", "split.csv", "key"):
        (data.parent / name).rename(moved / name)
    assert opened(data, None, join=True).fits == before.fits
    shutil.rmtree(before.folder.prepared)
    with pytest.raises(UsageError, match=r"--resume --set data\.manifest=FILE"):
        opened(data, None, join=True)
    again = opened(data, config(moved), join=True)
    assert again.fits == before.fits
    assert again.prepared.index.equals(before.prepared.index)


def test_another_content_is_another_config(data: Path) -> None:
    opened(data, config(data.parent), join=False)
    (data.parent / "split.csv").write_text("subject,split\nmeier,train\nmueller,test\n")
    with pytest.raises(UsageError, match="another config"):
        opened(data, config(data.parent), join=True)


def test_what_a_run_keeps_reads_back_equal(data: Path) -> None:
    kept = portable(config(data.parent))
    assert portable(kept) == kept
    assert kept == stored_config(opened(data, config(data.parent), join=False).folder, PIPELINE)
    other = for_other_data(merge(kept, {"data.manifest": str(data.parent / "files.csv")}))
    assert other.data.manifest == data.parent / "files.csv"
    assert other.split.file is None


def test_a_missing_key_is_asked_for(data: Path) -> None:
    lost = merge(config(data.parent), {"run.pseudonym_key": "not-kept"})
    with pytest.raises(UsageError, match=r"--set run\.pseudonym_key=FILE"):
        check_source(PIPELINE, data, lost)


def test_other_data_need_not_allow_the_protocol_of_the_run(data: Path) -> None:
    kept = portable(config(data.parent))
    values = {"run.pseudonym_key": None, "data.manifest": str(data.parent / "files.csv")}
    assert not check_source(PIPELINE, data, merge(for_other_data(kept), values)).errors
    with pytest.raises(UsageError, match=r"split\.file"):
        check_source(PIPELINE, data, merge(kept, values))
