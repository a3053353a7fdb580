"""The verb ``measure``: known figures of files, and what bad files do."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tests.pirads.masks import picai
from tests.pirads.volumes import affine, two_zones, write_nifti

from diptych import installed
from diptych.cli import run
from diptych.errors import DataError, UsageError
from diptych_pirads.measure import measure, measure_pair
from diptych_pirads.phantom import make_phantom
from diptych_pirads.verbs import MeasureOptions


def test_a_mask_against_itself_is_perfect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", two_zones())
    options = MeasureOptions(pred=path, ref=path, scheme="pz_tz", out=tmp_path / "all.csv")
    assert not measure(None, None, options).errors
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[1:]] == ["pz", "tz", "gland"]
    assert all(line.split()[2:4] == ["1.000", "0.000"] for line in printed[1:])
    table = pl.read_csv(tmp_path / "all.csv")
    assert {"apex", "mid", "base", "all"} == set(table["region"])


def test_a_shift_of_one_voxel_moves_the_surface_by_less_than_it(tmp_path: Path) -> None:
    a = write_nifti(tmp_path / "a.nii.gz", two_zones())
    b = write_nifti(tmp_path / "b.nii.gz", np.roll(two_zones(), 1, axis=2))
    row, _ = measure_pair(a, b, MeasureOptions(pred=a, ref=b, scheme="pz_tz", pred_scheme="pz_tz"))
    assert 0 < row["masd/gland"] < 1
    assert row["volume_error_ml/gland"] == pytest.approx(0)


def test_schemes_that_order_zones_otherwise_are_told_apart(tmp_path: Path) -> None:
    label = two_zones()
    a = write_nifti(tmp_path / "a.nii.gz", label)
    b = write_nifti(tmp_path / "b.nii.gz", np.array([0, 2, 1], np.uint8)[label])
    options = MeasureOptions(pred=a, ref=b, scheme="prostate158", pred_scheme="pz_tz")
    assert measure_pair(a, b, options)[0]["dice/pz"] == 1


def test_folders_are_paired_by_name_and_their_mean_is_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b", folder):
            write_nifti(tmp_path / folder / f"{name}.nii.gz", two_zones())
    options = MeasureOptions(pred=tmp_path / "pred", ref=tmp_path / "ref", scheme="pz_tz")
    measure(None, None, options)
    printed = capsys.readouterr().out
    assert "mean of 2" in printed
    assert "ref.nii.gz" not in printed


def test_a_bad_file_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        write_nifti(tmp_path / folder / "good.nii.gz", two_zones())
        write_nifti(tmp_path / folder / "bad.nii.gz", two_zones() * np.uint8(folder == "ref"))
    options = MeasureOptions(pred=tmp_path / "pred", ref=tmp_path / "ref", scheme="pz_tz")
    findings = measure(None, None, options)
    assert [(one.code, one.where) for one in findings.errors] == [("E109", "bad.nii.gz")]
    assert "good.nii.gz" in capsys.readouterr().out


def test_masks_of_different_places_are_refused(tmp_path: Path) -> None:
    a = write_nifti(tmp_path / "a.nii.gz", two_zones())
    b = write_nifti(tmp_path / "b.nii.gz", two_zones(), affine(origin=(-21.0, -25.0, 10.0)))
    with pytest.raises(DataError, match="E106"):
        measure_pair(a, b, MeasureOptions(pred=a, ref=b))
    with pytest.raises(UsageError, match="does not exist"):
        measure(None, None, MeasureOptions(pred=tmp_path / "none", ref=b))


def test_an_unknown_scheme_is_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    point = EntryPoint("pirads", "diptych_pirads.pipeline:PIPELINE", installed.GROUP)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(installed, "points", lambda: {"pirads": point})
        words = ["pirads", "measure", "--pred", "a.nii", "--ref", "b.nii", "--scheme", "pztz"]
        assert run(words) == 2
    assert "--scheme" in capsys.readouterr().err


@pytest.mark.data
def test_two_public_readers_differ_by_the_known_figures() -> None:
    a, b = (
        picai() / reader / "10021_1000021.nii.gz" for reader in ("zonal_yuan23", "zonal_hevi23")
    )
    options = MeasureOptions(pred=b, ref=a, scheme="pz_tz", pred_scheme="pz_tz")
    row, _ = measure_pair(b, a, options)
    assert row["masd/pz"] == pytest.approx(0.463, abs=1e-3)
    assert row["hd95/pz"] == pytest.approx(3.000, abs=1e-3)
    assert row["masd/tz"] == pytest.approx(0.936, abs=1e-3)
    assert row["hd95/tz"] == pytest.approx(3.742, abs=1e-3)


def test_a_label_of_another_scheme_names_the_option_that_sets_it(tmp_path: Path) -> None:
    label = make_phantom(0, 0).label
    for name in ("pred.nii", "ref.nii"):
        write_nifti(tmp_path / name, label.array, label.affine)
    pred, ref = tmp_path / "pred.nii", tmp_path / "ref.nii"
    options = MeasureOptions(pred=pred, ref=ref, scheme="zones4", pred_scheme="pz_tz")
    (finding,) = measure(None, None, options).errors
    assert (finding.code, finding.where) == ("E105", "pred.nii")
    assert "--pred-scheme" in finding.fix
    guessed = measure(None, None, MeasureOptions(pred=pred, ref=ref))
    assert {one.fix.rpartition(" ")[2] for one in guessed} == {"--scheme", "--pred-scheme"}
