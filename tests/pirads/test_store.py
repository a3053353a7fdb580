"""What the prepared folder keeps of studies, and what it must not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pirads.volumes import texture, two_zones, write_manifest, write_nifti

from diptych.errors import DataError
from diptych.prepared import Prepared
from diptych_pirads.check import check, survey
from diptych_pirads.config import PiradsConfig
from diptych_pirads.prepare import prepare_study
from diptych_pirads.store import other_labels, part_of, prepare, study

Row = dict[str, Any]


def config(**data: object) -> PiradsConfig:
    grid = {"spacing": [3.0, 1.5, 1.5], "size": [8, 32, 32]}
    return PiradsConfig.model_validate({"data": {"geometry": grid, **data}})


def rows(folder: Path) -> list[Row]:
    """Three patients: two readers, one label, none."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for n, (name, readers) in enumerate(
        (("anna", ("eve", "otto")), ("bert", ("eve",)), ("cleo", ()))
    ):
        t2 = write_nifti(folder / f"{name}_t2.nii.gz", texture(seed=n))
        row = {"subject_id": name, "study_id": f"{name}-2019", "t2": t2.name, "label": ""}
        row |= {"scheme": "", "reader": "", "split": "", "center": f"Spital {name}"}
        for shift, reader in enumerate(readers):
            label = np.roll(two_zones(), shift, axis=2)
            file = write_nifti(folder / f"{name}_{reader}.nii.gz", label)
            found.append(row | {"label": file.name, "scheme": "pz_tz", "reader": reader})
        if not readers:
            found.append(row)
    return found


def data(folder: Path, **changes: str) -> Path:
    write_manifest(folder / "studies.csv", *(row | changes for row in rows(folder)))
    return folder


def test_a_study_opens_as_it_was_prepared(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    prepared = prepare(config(), source, tmp_path / "p")
    first, _, second, _ = survey(config(), source).studies
    for row, manifest_row in enumerate((first, second)):
        fresh, opened = prepare_study(manifest_row, config()), study(prepared, row)
        assert isinstance(opened.image.array, np.memmap)
        np.testing.assert_allclose(opened.image.array, fresh.image.array, atol=1e-3)
        np.testing.assert_array_equal(opened.image.affine, fresh.image.affine)
        np.testing.assert_array_equal(opened.original.affine, fresh.original.affine)
        assert opened.original.size == fresh.original.size
        np.testing.assert_array_equal(opened.center, fresh.center)
        np.testing.assert_array_equal(opened.training_center, fresh.training_center)
        assert opened.training_center_from == fresh.training_center_from == "label"
        a, b = opened.label, fresh.label
        assert a is not None
        assert b is not None
        assert (a.scheme, a.seen, a.ceiling) == (b.scheme, b.seen, b.ceiling)
        for one, other in ((a.values, b.values), (a.reference, b.reference), (a.field, b.field)):
            np.testing.assert_array_equal(one.array, other.array)
            np.testing.assert_array_equal(one.affine, other.affine)
        np.testing.assert_array_equal(a.sdf, b.sdf)


def test_readers_are_numbered_and_the_first_is_trained_on(tmp_path: Path) -> None:
    prepared = prepare(config(), data(tmp_path / "data"), tmp_path / "p")
    assert prepared.index["readers"].to_list() == [["reader1", "reader2"], ["reader1"], []]
    assert prepared.index["scheme"].to_list() == ["pz_tz", "pz_tz", None]
    (reader, label), *rest = other_labels(prepared, 0).items()
    own = study(prepared, 0).label
    assert (reader, rest) == ("reader2", [])
    assert own is not None
    shift = label.values.to_lps(np.zeros(3)) - own.values.to_lps(np.zeros(3))
    np.testing.assert_allclose(shift, [1, 0, 0], atol=1.5)  # drawn one voxel to the left
    assert other_labels(prepared, 1) == {}
    assert study(prepared, 2).label is None


def test_the_gland_has_the_volume_of_the_label_file(tmp_path: Path) -> None:
    prepared = prepare(config(), data(tmp_path / "data"), tmp_path / "p")
    expected = np.count_nonzero(two_zones()) * 3 / 1000
    np.testing.assert_allclose(prepared.index["gland_ml"].to_list()[:2], expected)
    assert prepared.index["gland_ml"][2] is None


def test_nothing_that_is_written_holds_the_users_words(tmp_path: Path) -> None:
    prepare(config(), data(tmp_path / "hospital"), tmp_path / "p")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file())
    for word in ("anna", "bert", "cleo", "eve", "otto", "Spital", "2019", "hospital", "nii"):
        assert word.encode() not in everything, word


def test_a_changed_split_changes_rows_and_no_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data(tmp_path / "data")
    prepare(config(), source, tmp_path / "p")

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("diptych_pirads.store.prepare_study", never)
    prepared = prepare(config(), data(source, split="test", center="C"), tmp_path / "p")
    assert prepared.index["split"].to_list() == ["test"] * 3
    assert prepared.index["center"].to_list() == ["center-1"] * 3


def test_a_changed_label_is_read_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data(tmp_path / "data")
    before = prepare(config(), source, tmp_path / "p").index
    write_nifti(source / "bert_eve.nii.gz", np.roll(two_zones(), 2, axis=1))
    read: list[str] = []

    def counted(row: Any, cfg: PiradsConfig) -> Any:
        read.append(row.subject)
        return prepare_study(row, cfg)

    monkeypatch.setattr("diptych_pirads.store.prepare_study", counted)
    after = prepare(config(), source, tmp_path / "p").index
    assert read == ["bert"]
    same = (before["source"] == after["source"]).to_list()
    assert same == [True, False, True]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_broken_file_stops_or_its_row_is_left_out_and_listed(
    tmp_path: Path, on_error: str
) -> None:
    source = data(tmp_path / "data")
    (source / "anna_otto.nii.gz").write_bytes(b"<html>")
    (source / "cleo_t2.nii.gz").write_bytes(b"<html>")
    chosen = config(on_error=on_error)
    found = check(chosen, source)
    assert sorted({f.where for f in found if f.code == "E101"}) == [
        "anna_otto.nii.gz",
        "cleo_t2.nii.gz",
    ]
    if on_error == "stop":
        assert len(found.errors) == 2
        with pytest.raises(DataError):
            prepare(chosen, source, tmp_path / "p")
        assert {path.name for path in tmp_path.iterdir()} == {"data"}
        return
    assert not found.errors
    assert all("left out" in f.found for f in found.warnings)
    prepared = prepare(chosen, source, tmp_path / "p")
    assert prepared.index["readers"].to_list() == [["reader1"], ["reader1"]]


def test_a_shared_broken_image_leaves_out_every_row_that_names_it(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    (source / "anna_t2.nii.gz").write_bytes(b"<html>")
    kept = survey(config(on_error="skip"), source).studies
    assert [one.subject for one in kept] == ["bert", "cleo"]


def test_nothing_usable_is_an_error_even_when_errors_are_skipped(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    for file in source.glob("*_t2.nii.gz"):
        file.write_bytes(b"<html>")
    found = check(config(on_error="skip"), source)
    assert [finding.found for finding in found.errors] == ["no study can be used"]


def test_patients_that_share_a_series_become_one_subject(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    (source / "cleo_t2.nii.gz").unlink()
    write_nifti(source / "cleo_t2.nii.gz", texture(seed=1).astype(np.float32))  # bert's voxels
    assert [f.code for f in check(config(), source)] == ["W118"]
    prepared = prepare(config(), source, tmp_path / "p")
    anna, bert, cleo = prepared.index["subject"].to_list()
    assert bert == cleo != anna
    assert prepared.index["unit"].n_unique() == 3


def test_a_split_file_becomes_a_column(tmp_path: Path) -> None:
    source = data(tmp_path / "data")
    (tmp_path / "split.csv").write_text("subject,fold\nanna,a\nbert,b\n")
    section = {"kind": "file", "file": tmp_path / "split.csv"}
    chosen = config().model_copy(
        update={"split": PiradsConfig.model_validate({"split": section}).split}
    )
    prepared = prepare(chosen, source, tmp_path / "p")
    assert prepared.index["fold"].to_list() == ["a", "b", None]
    (tmp_path / "split.csv").write_text("subject,fold\nother,a\n")
    assert [f.code for f in check(chosen, source).errors] == ["E117"]


def test_facts_tell_the_grid_and_its_ceiling(tmp_path: Path) -> None:
    facts = prepare(config(), data(tmp_path / "data"), tmp_path / "p").facts
    json.dumps(facts)
    assert facts["spacing"] == [3.0, 1.5, 1.5]
    assert facts["size"] == [8, 32, 32]
    assert facts["channels"] == ["t2"]
    assert facts["schemes"] == {"pz_tz": 2}
    assert 0.9 < facts["ceiling"]["pz"]["lowest"] <= facts["ceiling"]["pz"]["mean"] < 1
    assert facts["cut_by_crop"] == 2  # the gland of 66 mm in a crop of 48 mm


def test_two_series_under_one_study_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    table = rows(folder)
    table[1]["t2"] = "bert_t2.nii.gz"
    write_manifest(folder / "studies.csv", *table)
    assert "E117" in [finding.code for finding in check(config(), folder).errors]


def test_studies_in_memory_open_the_same_way(tmp_path: Path) -> None:
    first, second, *_ = survey(config(), data(tmp_path / "data")).studies
    one, other = prepare_study(first, config()), prepare_study(second, config())
    assert other.label is not None
    part = part_of(one, {"reader2": other.label})
    index = part.rows.with_columns(subject=None)
    prepared = Prepared.from_arrays(index, {}, part.arrays, part.ragged)
    opened = study(prepared, 0)
    assert opened.label is not None
    assert one.label is not None
    np.testing.assert_array_equal(opened.label.sdf, one.label.sdf)
    assert list(other_labels(prepared, 0)) == ["reader2"]
