"""Crops are keyed, move image and label together, and change what they say they change."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from tests.pirads.studies import SPACING, phantom_study, study_of

from diptych.randomness import Draw
from diptych_pirads.augment import (
    IDENTITY,
    Warp,
    draw_warps,
    drop_channels,
    hidden_blocks,
    vary_intensities,
    warp_crop,
)
from diptych_pirads.config import ViewsSection
from diptych_pirads.labels import ANY
from diptych_pirads.prepare import crop_image, crop_label

torch.set_num_threads(1)
SIZE = (16, 48, 48)
DRAW = Draw(3, "stage-1").at(2).of("views")
VIEWS = ViewsSection()
NOTHING = ViewsSection(
    flip=0, rotation_degrees=(0, 0, 0), scale=(1, 1), gain=(1, 1), offset=0, gamma=(1, 1),
    bias=0, noise=0, blur=0,
)  # fmt: skip


def block_study(scheme: str = "zones4"):
    """A gland of two blocks, the left one TZ, in an image that is its label."""
    label = np.zeros((16, 64, 64), np.uint8)
    label[5:11, 24:40, 20:34] = 1
    label[5:11, 24:40, 34:44] = 2
    return study_of(label.astype(np.float32), label, scheme)


@pytest.mark.parametrize("scheme", ["zones4", "pz_tz"])
def test_a_crop_that_is_not_warped_is_that_of_prediction(scheme: str) -> None:
    study = phantom_study(1, scheme)
    size = (14, 48, 56)
    # a middle on the grid of `crop_image`, which interpolates nothing
    on_grid = study.image.to_lps(
        np.floor(study.image.to_index(study.training_center)) + np.array([0.5, 0.5, 0.5])
    )
    warp = Warp(
        np.eye(3),
        (study.image.to_index(on_grid) - study.image.to_index(study.training_center)) * SPACING,
    )
    crop = warp_crop(study, warp, size)
    assert np.allclose(crop.image, crop_image(study, on_grid, size).array, atol=1e-5)
    assert study.label is not None
    sets = study.label.scheme.to_sets(crop_label(study, on_grid, size))
    assert np.array_equal(crop.sets.numpy(), sets)
    assert (crop.sdf is None) == (scheme == "pz_tz")


@pytest.mark.parametrize("seed", range(3))
def test_label_and_image_move_together(seed: int) -> None:
    study = block_study()
    warp = draw_warps(Draw(seed), [0], VIEWS, (6.0, 8.0, 8.0))[0]
    crop = warp_crop(study, warp, SIZE)
    drawn = torch.round(crop.image[0]).long().clamp(0, 2)
    same = ((1 << drawn) == crop.sets)[crop.sets != ANY].float().mean()
    assert same > 0.985


def test_the_map_is_in_millimetres() -> None:
    image = np.zeros((16, 64, 64), np.float32)
    image[10, 40, 22] = 1
    study = study_of(image, None)
    middle = (np.array(image.shape) - 1) / 2
    for axis, angles in enumerate(np.eye(3) * 10):
        views = NOTHING.model_copy(update={"rotation_degrees": tuple(angles)})
        warp = draw_warps(Draw(1), [5], views, (6, 8, 8))[0]
        found = warp_crop(study, warp, image.shape, distances=False).image[0].numpy()
        at = np.array(ndimage.center_of_mass(found)) - middle
        position = warp.matrix @ (at * SPACING) + warp.shift
        assert np.allclose(position, (np.array([10, 40, 22]) - middle) * SPACING, atol=0.8), axis
        lengths = [np.linalg.norm(v) for v in (at * SPACING, position - warp.shift)]
        assert lengths[0] == pytest.approx(lengths[1], abs=0.1)


def test_left_and_right_are_exchanged_about_the_middle() -> None:
    study = phantom_study(2)
    mirror = Warp(np.diag([1.0, 1.0, -1.0]), np.zeros(3))
    plain, mirrored = warp_crop(study, IDENTITY, SIZE), warp_crop(study, mirror, SIZE)
    assert torch.allclose(mirrored.image, plain.image.flip(-1), atol=1e-4)
    assert (mirrored.sets == plain.sets.flip(-1)).float().mean() > 0.999


def test_larger_things_have_larger_distances() -> None:
    study = block_study()
    larger = warp_crop(study, Warp(np.eye(3) / 1.1, np.zeros(3), 1.1), SIZE)
    plain = warp_crop(study, IDENTITY, SIZE)
    gland = [(crop.sets > 1).sum().item() for crop in (plain, larger)]
    assert gland[1] / gland[0] == pytest.approx(1.1**3, rel=0.12)
    assert larger.sdf is not None
    assert plain.sdf is not None
    assert larger.sdf[0].max() / plain.sdf[0].max() == pytest.approx(1.1, rel=0.05)


@pytest.mark.parametrize("index", range(3))
def test_the_box_of_the_gland_holds_all_that_the_whole_crop_would(index: int) -> None:
    study = phantom_study(index)
    warp = draw_warps(Draw(index), [1], VIEWS, (6.0, 8.0, 8.0))[0]
    crop = warp_crop(study, warp, SIZE)
    alone = warp_crop(study, warp, SIZE, distances=False)
    assert torch.equal(crop.sets, alone.sets)
    assert crop.sdf is not None
    assert alone.sdf is None
    # the straight way: every class's map over the whole crop
    label = study.label
    assert label is not None
    first = np.rint(study.image.to_index(label.values.to_lps(np.zeros(3))))
    wide = np.pad(label.sdf, [(0, 0)] + [(40, 40)] * 3, constant_values=-127).astype(np.float64)
    wide = np.concatenate([-wide.max(0, keepdims=True), wide])
    index_ = np.indices(SIZE).reshape(3, -1).T - (np.array(SIZE) - 1) / 2
    place = index_ * SPACING @ warp.matrix.T + warp.shift
    place = place / SPACING + study.image.to_index(study.training_center) - first + 40
    maps = np.stack([ndimage.map_coordinates(m, place.T, order=1) for m in wide])
    expected = 1 << maps.argmax(0).reshape(SIZE)
    seen = crop.sets.numpy() != ANY
    assert (expected[seen] == crop.sets.numpy()[seen]).mean() > 0.9999
    found = crop.sdf.numpy() / warp.scale
    inside = np.abs(maps[1:].reshape(4, *SIZE)) < 100
    assert np.allclose(found[inside], maps[1:].reshape(4, *SIZE)[inside] / 10, atol=0.02)


def test_beyond_the_series_nothing_is_known() -> None:
    study = block_study()
    crop = warp_crop(study, Warp(np.eye(3), np.array([0, 0, 40.0])), SIZE)
    assert crop.inside is not None
    assert (crop.image[0, ~crop.inside] == 0).all()
    assert (crop.sets[~crop.inside] == ANY).all()
    assert (crop.sets[crop.inside] != ANY).all()
    assert warp_crop(study_of(study.image.array, None), IDENTITY, SIZE).sets.eq(ANY).all()


def test_two_zone_labels_become_sets() -> None:
    crop = warp_crop(block_study("pz_tz"), IDENTITY, SIZE)
    assert set(crop.sets.unique().tolist()) == {0b00001, 0b01010, 0b11100}


def test_draws_depend_on_the_item_alone() -> None:
    together = draw_warps(DRAW, [4, 9], VIEWS, (6, 8, 8))
    alone = draw_warps(DRAW, [9], VIEWS, (6, 8, 8))[0]
    assert np.array_equal(together[1].matrix, alone.matrix)
    assert np.array_equal(together[1].shift, alone.shift)
    assert not np.array_equal(together[0].matrix, alone.matrix)
    x = torch.rand(2, 2, 4, 16, 16) + 0.1
    both = vary_intensities(x, DRAW, [4, 9], VIEWS)
    assert torch.allclose(both[1:], vary_intensities(x[1:], DRAW, [9], VIEWS), atol=1e-6)
    assert torch.equal(both, vary_intensities(x, DRAW, [4, 9], VIEWS))
    assert not torch.equal(both, vary_intensities(x, DRAW.of("b"), [4, 9], VIEWS))


def test_maps_stay_in_their_ranges() -> None:
    warps = draw_warps(DRAW, list(range(200)), VIEWS, (6, 8, 8))
    scales = np.array([warp.scale for warp in warps])
    assert scales.min() > 0.9
    assert scales.max() < 1.1
    assert 0.3 < np.mean([np.linalg.det(warp.matrix) < 0 for warp in warps]) < 0.7
    shifts = np.abs([warp.shift for warp in warps])
    assert (shifts <= [6, 8, 8]).all()
    assert (shifts.max(0) > [5, 7, 7]).all()
    turned = [abs(warp.matrix[1, 2]) * warp.scale for warp in warps]  # about z
    assert np.sin(np.radians(8)) < max(turned) < np.sin(np.radians(11))


def test_each_change_of_intensity_does_what_it_is_called() -> None:
    x = torch.rand(1, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1

    def varied(**changes):
        return vary_intensities(x, DRAW, [1], NOTHING.model_copy(update=changes), rician=False)

    assert torch.allclose(varied(), x)
    assert torch.allclose(varied(gain=(1.1, 1.1)), 1.1 * x)
    assert torch.allclose(varied(gamma=(0.8, 0.8)), x**0.8, atol=1e-6)
    offset = varied(offset=0.1) - x
    assert offset.std() < 1e-6
    assert 0 < offset.abs().mean() <= 0.1
    bias = (varied(bias=0.2) / x).log()
    assert 0 < bias.abs().max() <= 0.2
    steps = [bias.diff(dim=axis).abs().max().item() for axis in (3, 4)]
    assert max(steps) < 0.1
    noise = varied(noise=0.03) - x
    assert 0 < noise.std() < 0.03
    blurred = varied(blur=0.7)
    assert blurred.std() < x.std()
    assert blurred.mean().item() == pytest.approx(x.mean().item(), abs=5e-3)


def test_blur_is_a_gaussian_within_slices() -> None:
    point = torch.zeros(1, 1, 3, 9, 9)
    point[..., 1, 4, 4] = 1
    views = NOTHING.model_copy(update={"blur": 0.7})
    sigma = float(DRAW.of("blur").uniform([1], 1, 0, 0.7)[0, 0])
    x = point + 1  # voxels of exactly 0 are no voxels
    found = (vary_intensities(x, DRAW, [1], views, rician=False) - 1)[0, 0].numpy()
    expected = ndimage.gaussian_filter(point[0, 0].numpy(), (0, sigma, sigma), radius=2)
    assert np.allclose(found, expected, atol=1e-5)


def test_padding_and_missing_channels_stay_zero() -> None:
    x = torch.rand(2, 2, 4, 16, 16) + 0.1
    x[1, 1] = 0
    inside = torch.ones(2, 4, 16, 16, dtype=torch.bool)
    inside[:, :, :3] = False
    y = vary_intensities(x, DRAW, [0, 1], VIEWS, inside=inside)
    assert (y[1, 1] == 0).all()
    assert (y[:, :, :, :3] == 0).all()
    assert (y[0, :, :, 3:] != 0).all()


def test_t2_is_never_dropped_and_the_others_sometimes() -> None:
    x = torch.ones(400, 3, 1, 1, 1)
    kept = drop_channels(x, DRAW, list(range(400)), 0.25)[:, :, 0, 0, 0].mean(0)
    assert kept[0] == 1
    assert kept[1:].numpy() == pytest.approx([0.75, 0.75], abs=0.08)


def test_hidden_blocks_have_their_size_and_share() -> None:
    blocks = hidden_blocks(DRAW, list(range(20)), (16, 64, 48))
    assert blocks.shape == (20, 1, 16, 64, 48)
    assert blocks.float().mean().item() == pytest.approx(0.15, abs=0.03)
    whole = blocks[:, 0].reshape(20, 4, 4, 4, 16, 3, 16).float()
    assert set(whole.mean((2, 4, 6)).unique().tolist()) == {0.0, 1.0}
