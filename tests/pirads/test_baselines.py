import numpy as np
import pytest
from scipy import ndimage
from tests.pirads.masks import gland_of_four, mask, studies_of_one_grid
from tests.pirads.studies import phantom_study

from diptych_pirads.baselines import MEAN_SHAPE_SPACING, BoxAtlas, MeanShape
from diptych_pirads.geometry import bounding_box
from diptych_pirads.metrics import dice, masd
from diptych_pirads.phantom import make_phantom

SPACING = (3.0, 1.0, 1.0)
SIZE = (12, 24, 24)
MIDDLE = tuple((n - 1) / 2 for n in SIZE)


def test_the_mean_shape_of_equal_labels_is_that_label() -> None:
    label = gland_of_four()
    shape = MeanShape.fit_labels([label] * 3, [SPACING] * 3, [MIDDLE] * 3, SPACING, SIZE)
    np.testing.assert_allclose(shape.frequencies.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(shape.on_grid(SIZE, SPACING, MIDDLE).argmax(axis=0), label)


def test_frequencies_are_the_mean_over_studies() -> None:
    label = gland_of_four()
    labels = [label, label, label, np.zeros_like(label)]
    shape = MeanShape.fit_labels(labels, [SPACING] * 4, [MIDDLE] * 4, SPACING, SIZE)
    np.testing.assert_allclose(shape.frequencies[2][label == 2], 0.75)
    np.testing.assert_allclose(shape.frequencies[0][label == 2], 0.25)


def test_studies_are_aligned_at_their_centres_in_mm() -> None:
    label = gland_of_four()
    moved = np.roll(label, (2, 3), axis=(1, 2))
    center = (MIDDLE[0], MIDDLE[1] + 2, MIDDLE[2] + 3)
    shape = MeanShape.fit_labels([label, moved], [SPACING] * 2, [MIDDLE, center], SPACING, SIZE)
    found = shape.on_grid(SIZE, SPACING, center).argmax(axis=0)
    np.testing.assert_array_equal(found, moved)
    fine_label = label.repeat(2, axis=1).repeat(2, axis=2)
    fine_center = (MIDDLE[0], 23.5, 23.5)
    from_fine = MeanShape.fit_labels([fine_label], [(3.0, 0.5, 0.5)], [fine_center], SPACING, SIZE)
    assert (from_fine.frequencies.argmax(axis=0) == label).mean() > 0.98
    fine = shape.on_grid((12, 48, 48), (3.0, 0.5, 0.5), fine_center).argmax(axis=0)
    # Each voxel of 1 mm holds four of 0.5 mm; interpolation moves a border by less than one.
    assert (fine == fine_label).mean() > 0.98


def test_beyond_what_was_seen_the_mean_shape_says_background() -> None:
    label = np.full(SIZE, 1, np.uint8)
    shape = MeanShape.fit_labels([label], [SPACING], [MIDDLE], SPACING, SIZE)
    prob = shape.on_grid((12, 40, 40), SPACING, (5.5, 19.5, 19.5))
    np.testing.assert_allclose(prob[0, :, :7], 1)
    np.testing.assert_allclose(prob.sum(axis=0), 1, atol=1e-6)


def test_the_box_atlas_stretches_to_the_box_of_the_gland() -> None:
    label = gland_of_four()
    box = bounding_box(label > 0)
    assert box is not None
    atlas = BoxAtlas.fit_labels([label, np.zeros_like(label)], size=(8, 16, 16))
    target = np.zeros((24, 50, 50), bool)
    target[3:19, 5:37, 8:40] = True  # twice the box along each axis
    prob = atlas.in_box(target)
    np.testing.assert_allclose(prob.sum(axis=0), 1, atol=1e-6)
    found = prob.argmax(axis=0)
    assert not found[~target].any()
    doubled = label[box]
    for axis in range(3):
        doubled = doubled.repeat(2, axis=axis)
    assert (found[3:19, 5:37, 8:40] == doubled).mean() > 0.95


def test_studies_give_what_their_labels_give() -> None:
    studies = [phantom_study(index) for index in range(3)]
    labels = [study.label for study in studies]
    assert all(label is not None for label in labels)
    arrays = [label.values.array for label in labels if label is not None]
    spacings = [label.values.spacing for label in labels if label is not None]
    centers = [
        tuple(label.values.to_index(study.center))
        for study, label in zip(studies, labels, strict=True)
        if label is not None
    ]
    gland_alone = phantom_study(3, "gland")
    unlabelled = phantom_study(4, None)
    shape = MeanShape.fit([*studies, gland_alone, unlabelled])
    expected = MeanShape.fit_labels(arrays, spacings, centers)
    np.testing.assert_array_equal(shape.frequencies, expected.frequencies)
    found = shape.predict(unlabelled)
    assert found.size == unlabelled.image.size
    index = tuple(unlabelled.image.to_index(unlabelled.center))
    np.testing.assert_array_equal(
        found.array, expected.on_grid(found.size, unlabelled.image.spacing, index)
    )
    atlas = BoxAtlas.fit(iter([*studies, unlabelled]))
    np.testing.assert_array_equal(atlas.frequencies, BoxAtlas.fit_labels(arrays).frequencies)
    with pytest.raises(ValueError, match="at least one"):
        MeanShape.fit([gland_alone, unlabelled])


def test_the_atlas_takes_the_readers_box_unless_it_is_told_another() -> None:
    study = phantom_study(0)
    atlas = BoxAtlas.fit([study])
    truth = make_phantom(0, 0).label.array
    told = atlas.predict(study).array.argmax(axis=0)
    assert dice(told > 0, truth > 0) > 0.95
    assert not atlas.predict(study, np.full((2, 3), np.nan)).array[1:].any()
    box = np.array([[2, 10, 10], [6, 20, 20]], float)
    inside = np.zeros_like(truth, bool)
    inside[2:6, 10:20, 10:20] = True
    assert not atlas.predict(study, box).array[1:, ~inside].any()
    with pytest.raises(ValueError, match="no label"):
        atlas.predict(phantom_study(1, None))


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MeanShape.fit_labels([], [], [])
    with pytest.raises(ValueError, match="at least one"):
        BoxAtlas.fit_labels([np.zeros((3, 3, 3), np.uint8)])


@pytest.mark.data
@pytest.mark.slow
def test_shape_alone_reaches_on_public_masks_what_was_measured() -> None:
    labels, spacings = [], []
    for study in studies_of_one_grid():
        zones = mask("zonal_yuan23", study)
        box = bounding_box(zones.array > 0, [int(np.ceil(10 / step)) for step in zones.spacing])
        labels.append(zones.array[box])
        spacings.append(zones.spacing)
    centers = [ndimage.center_of_mass(label > 0) for label in labels]
    shapes = [
        MeanShape.fit_labels([label], [spacing], [center]).frequencies
        for label, spacing, center in zip(labels, spacings, centers, strict=True)
    ]
    boxes = [BoxAtlas.fit_labels([label]).frequencies for label in labels]
    all_shapes, all_boxes, others = sum(shapes), sum(boxes), len(labels) - 1
    rows = []
    for n, label in enumerate(labels):
        gland = label > 0
        shape = MeanShape((all_shapes - shapes[n]) / others, MEAN_SHAPE_SPACING)
        mean = shape.on_grid(label.shape, spacings[n], centers[n]).argmax(axis=0)
        prob = BoxAtlas((all_boxes - boxes[n]) / others).in_box(gland)
        atlas = prob.argmax(axis=0)
        # The published form of the known gland: what the atlas leaves to background is PZ.
        known = np.where(gland, np.where(atlas == 2, 2, 1), 0)
        rows.append(
            [dice(mean == 1, label == 1), dice(mean == 2, label == 2), dice(mean > 0, gland)]
            + [dice(atlas == zone, label == zone) for zone in (1, 2)]
            + [masd(atlas == zone, label == zone, spacings[n]) for zone in (1, 2)]
            + [dice(known == zone, label == zone) for zone in (1, 2)]
        )
    expected = [0.533, 0.722, 0.803, 0.628, 0.802, 1.99, 1.84, 0.770, 0.831]
    np.testing.assert_allclose(np.mean(rows, axis=0), expected, atol=0.02)
