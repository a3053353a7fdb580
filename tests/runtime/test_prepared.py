"""What a prepared folder promises about arrays whose shape differs from row to row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych import prepared as prepared_module
from diptych.contract import Fit
from diptych.errors import DataError
from diptych.initial import seen_sources
from diptych.manifest import Manifest, Source
from diptych.prepared import Part, Prepared, prepare_parts
from diptych.run import RunFolder
from diptych.split import Split
from diptych.training import subjects_seen

SOURCES = [Source(Path("unused"), f"{n:x}" * 64, 1, {"subject": f"S-{n}"}) for n in (1, 2, 3)]


def convert(one: Source) -> Part:
    """Two rows; the second has no mask, and arrays of other shapes than the first."""
    n = int(one.digest[0], 16)
    images = [np.full((n, 2), n, np.float16), np.full((1, n + 3), 10 * n, np.float16)]
    masks = [np.full(n, n, np.uint8), None]
    even = np.array([n, n + 0.5])
    rows = pl.DataFrame({"name": [f"{n}a", f"{n}b"]})
    return Part(rows, {"even": even}, {}, {"image": images, "mask": masks})


def prepared(target: Path, sources: list[Source], own: Callable[[Source], Part]) -> Prepared:
    return prepare_parts(target, sources, own, version="1", settings={}, facts=lambda _: {})


def check_contents(found: Prepared, order: list[int]) -> None:
    for place, n in enumerate(order):
        first, second = (found.ragged("image", 2 * place + k) for k in (0, 1))
        np.testing.assert_array_equal(first, np.full((n, 2), n))
        np.testing.assert_array_equal(second, np.full((1, n + 3), 10 * n))
        np.testing.assert_array_equal(found.ragged("mask", 2 * place), np.full(n, n))
        with pytest.raises(KeyError):
            found.ragged("mask", 2 * place + 1)


def test_each_row_opens_its_own_array_memory_mapped(tmp_path: Path) -> None:
    found = prepared(tmp_path / "p", SOURCES, convert)
    check_contents(found, [1, 2, 3])
    assert isinstance(found.ragged("image", 0), np.memmap)
    assert found.ragged("image", 0).dtype == np.float16
    np.testing.assert_array_equal(found.array("even"), [1, 1.5, 2, 2.5, 3, 3.5])
    assert not list(tmp_path.glob(".p.partial"))


def test_unchanged_files_keep_their_arrays_under_new_row_numbers(tmp_path: Path) -> None:
    prepared(tmp_path / "p", SOURCES, convert)
    again: list[str] = []

    def counted(one: Source) -> Part:
        again.append(one.name)
        return convert(one)

    found = prepared(tmp_path / "p", [SOURCES[2], SOURCES[0]], counted)
    assert again == []
    check_contents(found, [3, 1])
    assert len(list((tmp_path / "p" / "image").iterdir())) == 4
    found = prepared(tmp_path / "p", SOURCES, counted)
    assert again == [SOURCES[1].name]
    check_contents(found, [1, 2, 3])


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    done: list[str] = []

    def interrupted(one: Source) -> Part:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(one.name)
        return convert(one)

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "p", SOURCES, interrupted)
    assert not (tmp_path / "p").exists()

    def rest(one: Source) -> Part:
        assert one.name not in done
        return convert(one)

    check_contents(prepared(tmp_path / "p", SOURCES, rest), [1, 2, 3])


def test_arrays_are_whole_when_the_process_dies_while_they_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = prepared_module._assemble

    def die(*given: Any) -> None:
        gather(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "_assemble", die)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "p", SOURCES, convert)

    def never(_: Source) -> Part:
        raise AssertionError

    check_contents(prepared(tmp_path / "p", SOURCES, never), [1, 2, 3])


def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    check_contents(prepared(tmp_path / "p", SOURCES, convert), [1, 2, 3])


def test_lists_of_another_length_than_the_rows_are_refused(tmp_path: Path) -> None:
    def short(_: Source) -> Part:
        return Part(pl.DataFrame({"name": ["a", "b"]}), {}, {}, {"image": [np.zeros(1)]})

    with pytest.raises(ValueError, match="2 rows"):
        prepared(tmp_path / "p", SOURCES, short)


def test_data_in_memory_open_the_same_way() -> None:
    index = pl.DataFrame({"subject": ["a", "b"]})
    arrays = {"image": [np.zeros((1, 2)), np.ones((3, 4))], "mask": [None, np.ones(2)]}
    found = Prepared.from_arrays(index, {}, {}, arrays)
    assert found.ragged("image", 1).shape == (3, 4)
    for name, row in (("mask", 0), ("other", 0)):
        with pytest.raises(KeyError):
            found.ragged(name, row)


def test_a_source_is_known_by_each_of_its_files(tmp_path: Path) -> None:
    files = ("a" * 64, "b" * 64)
    one = Source(Path("unused"), "1" * 64, 1, {"subject": "S-1"}, files)
    prepared(tmp_path / "p", [one], convert)
    (entry,) = Manifest.read(tmp_path / "p").sources
    assert entry.names == {"1" * 12, "a" * 12, "b" * 12}


def test_a_study_that_comes_with_another_label_is_still_known(tmp_path: Path) -> None:
    image, labels, other = "a" * 64, ("b" * 64, "c" * 64), "d" * 64
    for name, digest, label in zip("pq", ("1" * 64, "2" * 64), labels, strict=True):
        mine = Source(Path("unused"), digest, 1, {"subject": f"S-{name}"}, (image, label))
        prepared(tmp_path / name, [mine], convert)
    run = RunFolder(tmp_path / "p")
    assert subjects_seen(run, Prepared.open(tmp_path / "q")) == ["S-q"]
    fit = Fit("final", Split((0, 1)), 1)
    assert set(seen_sources(run, fit)) == {"1" * 12, image[:12], labels[0][:12]}
    fresh = Source(Path("unused"), "4" * 64, 1, {"subject": "S-r"}, (other,))
    prepared(tmp_path / "r", [fresh], convert)
    assert subjects_seen(run, Prepared.open(tmp_path / "r")) == []


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(one: Source) -> Part:
        if one is SOURCES[1]:
            raise DataError("broken")
        return convert(one)

    with pytest.raises(DataError, match="broken"):
        prepared(tmp_path / "p", SOURCES, broken)
    assert {path.name for path in tmp_path.iterdir()} <= {".p.lock"}
