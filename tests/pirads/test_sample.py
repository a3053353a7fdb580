import csv
from pathlib import Path

import numpy as np
import pytest

from diptych_pirads import sample
from diptych_pirads.check import check_manifest
from diptych_pirads.read import read_volume
from diptych_pirads.sample import write_dataset, write_sample


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "studies.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_dataset_reads_back_as_it_was_made(tmp_path: Path) -> None:
    write_dataset(tmp_path, 3, seed=2)
    table = rows(tmp_path)
    assert [row["scheme"] for row in table] == ["zones4", "pz_tz", ""]
    expected = sample.make_phantom(2, 0)
    image = read_volume(tmp_path / table[0]["t2"])
    np.testing.assert_array_equal(image.array, expected.image.array)
    np.testing.assert_allclose(image.affine, expected.image.affine, atol=1e-5)
    np.testing.assert_array_equal(
        read_volume(tmp_path / table[0]["label"]).array, expected.label.array
    )
    two = read_volume(tmp_path / table[1]["label"]).array
    truth = sample.make_phantom(2, 1).label.array
    np.testing.assert_array_equal(two == 1, truth == 1)
    np.testing.assert_array_equal(two == 2, truth > 1)
    assert table[2]["label"] == ""


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 1, seed=1)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_sample_has_its_parts_and_a_second_reader_for_the_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_of_each = [(scheme, part, 1) for scheme, part, _ in sample.SAMPLE]
    monkeypatch.setattr(sample, "SAMPLE", one_of_each)
    write_sample(tmp_path)
    table = rows(tmp_path)
    by_part = {row["split"] for row in table}
    assert by_part == {"train", "validation", "test"}
    test = [row for row in table if row["split"] == "test"]
    assert [row["reader"] for row in test] == ["first", "second"]
    assert len({row["study_id"] for row in test}) == 1
    first, second = (read_volume(tmp_path / row["label"]).array for row in test)
    assert (first != second).any()
    for row in table:
        assert float(row["psa"]) > 0
        for column in ("t2", "label"):
            assert not row[column] or (tmp_path / row[column]).is_file()


def test_the_sample_passes_its_own_check(tmp_path: Path) -> None:
    write_dataset(tmp_path, 3, seed=5)
    assert check_manifest(tmp_path / "studies.csv") == []


def test_unknown_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zones5"):
        write_dataset(tmp_path, 1, schemes=("zones5",))
    assert not list(tmp_path.iterdir())
