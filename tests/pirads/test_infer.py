"""One study through a network: where it is cropped, what comes back, and on which grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.pirads.masks import mask
from tests.pirads.reading_network import CONFIG, FACTS, Reader, use_readers
from tests.pirads.volumes import real_data

from diptych.config import merge
from diptych_pirads.geometry import Volume, resample
from diptych_pirads.infer import count_pieces, segment
from diptych_pirads.labels import DPU, PZ, ZONES
from diptych_pirads.metrics import dice
from diptych_pirads.phantom import make_phantom
from diptych_pirads.prepare import PreparedStudy
from diptych_pirads.read import read_volume

STILL = merge(CONFIG, {"data.crop.center": "volume"})


@pytest.fixture(autouse=True)
def _readers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    use_readers(monkeypatch)


def study_of(zones: Volume, **changes: Any) -> PreparedStudy:
    """A study whose image shows its zones, taken at half the voxel size in the plane."""
    fields: dict[str, Any] = {
        "image": zones.with_array((zones.array / 4).astype(np.float32)[None]),
        "present": (True,),
        "original": resample(zones, (3.0, 0.5, 0.5), 0),
        "center": zones.to_lps((np.array(zones.size) - 1) / 2),
        "training_center": np.zeros(3),
        "training_center_from": "volume",
        "label": None,
    }
    return PreparedStudy(**(fields | changes))


def off_center() -> Volume:
    """A gland whose middle lies 30 mm in front of the series' middle."""
    label = make_phantom(0, 1).label
    return Volume(np.pad(label.array, ((0, 0), (0, 60), (0, 0))), label.affine)


def test_zones_come_back_on_the_grid_of_the_series() -> None:
    study = study_of(make_phantom(0, 0).label)
    zones = segment(Reader(), study, CONFIG, FACTS).zones
    assert zones.size == (16, 128, 128)
    assert zones.array.dtype == np.uint8
    for number in range(1, len(ZONES)):
        assert dice(zones.array == number, study.original.array == number) > 0.9


def test_the_crop_moves_to_the_gland_and_no_gland_is_lost() -> None:
    label = off_center()
    study = study_of(label)
    gland = label.to_lps(np.argwhere(label.array > 0).mean(axis=0))
    found = segment(Reader(), study, CONFIG, FACTS)
    assert np.linalg.norm(found.center - gland) < 8
    more = segment(Reader(), study, merge(CONFIG, {"predict.passes": 3}), FACTS)
    assert np.linalg.norm(more.center - gland) < 1
    assert dice(found.zones.array > 0, study.original.array > 0) > 0.97
    once = segment(Reader(), study, merge(CONFIG, {"predict.passes": 1}), FACTS)
    assert np.array_equal(once.center, study.center)
    assert dice(once.zones.array > 0, study.original.array > 0) < 0.9


@pytest.mark.parametrize("fixed", ["roi3", "volume"])
def test_a_center_that_is_known_is_kept(fixed: str) -> None:
    asked = STILL if fixed == "volume" else CONFIG
    study = study_of(off_center(), training_center_from=fixed)
    assert np.array_equal(segment(Reader(), study, asked, FACTS).center, study.center)


def test_the_label_of_a_study_is_never_looked_at() -> None:
    label = make_phantom(0, 2).label
    plain = segment(Reader(), study_of(label), CONFIG, FACTS)
    moved = study_of(label, label=object(), training_center=np.full(3, 40.0))
    assert np.array_equal(plain.zones.array, segment(Reader(), moved, CONFIG, FACTS).zones.array)


def test_with_both_mirror_images_a_lopsided_network_becomes_symmetric() -> None:
    label = make_phantom(0, 3).label
    other = label.with_array(label.array[..., ::-1])
    lopsided = Reader(drift=0.2)
    seen, mirrored = (segment(lopsided, study_of(v), STILL, FACTS) for v in (label, other))
    assert np.allclose(seen.prob.array, mirrored.prob.array[..., ::-1], atol=1e-6)
    single = merge(STILL, {"predict.tta": "none"})
    seen, mirrored = (segment(lopsided, study_of(v), single, FACTS) for v in (label, other))
    assert np.abs(seen.prob.array - mirrored.prob.array[..., ::-1]).max() > 0.1


def test_disagreement_is_one_minus_the_dice_of_the_paths() -> None:
    study = study_of(make_phantom(0, 4).label)
    config = merge(CONFIG, {"predict.tta": "none"})
    agreed = segment(Reader(), study, config, FACTS)
    assert agreed.disagreement == {"pz": 0.0}
    assert agreed.difference is not None
    assert agreed.difference.array.max() == 0
    apart = segment(Reader(shift=5), study, config, FACTS)
    pz = apart.prob.array[PZ] >= 0.5
    expected = 1 - 2 * (pz & np.roll(pz, 5, -1)).sum() / (2 * pz.sum())
    assert apart.disagreement["pz"] == pytest.approx(expected)


def test_islands_are_counted_and_do_not_reach_the_zones() -> None:
    label = make_phantom(0, 5).label
    array = label.array.copy()
    array[1, 1:8, 1:8] = DPU
    found = segment(Reader(), study_of(label.with_array(array)), CONFIG, FACTS)
    assert found.components == 2
    assert not found.zones.array[:3, :18, :18].any()
    kept = merge(CONFIG, {"predict.postprocess": "none"})
    raw = segment(Reader(), study_of(label.with_array(array)), kept, FACTS)
    assert raw.zones.array[1, 4, 4] == DPU


def test_crumbs_are_no_pieces_and_a_gland_however_small_is_one() -> None:
    label = make_phantom(0, 5).label
    array = label.array.copy()
    array[1, 1:4, 1:12] = DPU  # 33 voxels of 0.003 mL, just under a tenth
    study = study_of(label.with_array(array))
    assert segment(Reader(), study, CONFIG, FACTS).components == 1
    exact = merge(CONFIG, {"predict.least_piece_ml": 0.0})
    assert segment(Reader(), study, exact, FACTS).components == 2
    crumb = np.zeros_like(array, bool)
    assert count_pieces(crumb, 0.003, 0.1) == 0
    crumb[3, 3, 3] = crumb[5, 5, 5] = True
    assert count_pieces(crumb, 0.003, 0.1) == 1


@pytest.mark.data
def test_a_public_mask_with_a_slip_of_the_pen_is_one_piece() -> None:
    slip = read_volume(real_data() / "bad" / "b14_island.nii.gz")  # 16 voxels beside the gland
    counts = [count_pieces(slip.array > 0, slip.voxel_ml, least) for least in (0.0, 0.1)]
    assert counts == [2, 1]
    for name in ("10000_1000000", "10699_1000715"):
        whole = mask("zonal_yuan23", name)
        assert count_pieces(whole.array > 0, whole.voxel_ml, 0.0) == 1


def test_a_series_without_gland_gives_no_zones_and_no_number() -> None:
    label = make_phantom(0, 6).label
    empty = segment(Reader(), study_of(label.with_array(label.array * 0)), CONFIG, FACTS)
    assert not empty.zones.array.any()
    assert empty.components == 0
    assert np.isnan(empty.entropy)
    assert np.isnan(empty.disagreement["pz"])


def test_entropy_falls_as_the_network_grows_sure() -> None:
    study = study_of(make_phantom(0, 7).label)
    sure, unsure = (segment(Reader(k), study, CONFIG, FACTS).entropy for k in (400.0, 10.0))
    assert 0 <= sure < 0.01 < unsure < np.log(len(ZONES))


def test_features_are_those_of_the_last_crop_as_it_is() -> None:
    label = make_phantom(0, 8).label
    network = Reader()
    found = segment(network, study_of(label), STILL, FACTS)
    x = torch.from_numpy(label.array / 4).float()[None, None]
    expected = network.coarse(x).mean(dim=(0, 2, 3, 4))
    assert np.allclose(found.features, expected.detach().numpy(), atol=1e-5)


def test_a_network_in_training_goes_on_training() -> None:
    network = Reader()
    segment(network.train(), study_of(make_phantom(0, 9).label), CONFIG, FACTS)
    assert network.training
