import numpy as np
import pytest
from scipy import ndimage

from diptych_pirads.metrics import dice, masd
from diptych_pirads.phantom import Phantom, make_phantom
from diptych_pirads.volumetry import zone_volumes

SPACING = (3.0, 1.0, 1.0)
ARRAYS = ("image", "label", "reader2", "lesions")


def contents(phantom: Phantom) -> list[bytes]:
    return [getattr(phantom, name).array.tobytes() for name in ARRAYS]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first = make_phantom(3, 5)
    again = make_phantom(3, 5)
    assert contents(first) == contents(again)
    assert first.params == again.params
    assert contents(first) != contents(make_phantom(4, 5))
    assert contents(first) != contents(make_phantom(3, 6))


def test_a_phantom_has_the_promised_form() -> None:
    phantom = make_phantom(0, 1, shape=(16, 70, 66), spacing=(3.0, 0.9, 0.9))
    assert {getattr(phantom, name).size for name in ARRAYS} == {(16, 70, 66)}
    assert phantom.image.array.dtype == np.float32
    assert phantom.image.array.min() == 0
    assert phantom.image.array.max() == 1
    assert phantom.label.spacing == pytest.approx((3.0, 0.9, 0.9))
    normal = phantom.label.directions[:, 2]
    assert np.degrees(np.arccos(normal[2])) == pytest.approx(12)
    middle = phantom.label.to_lps((np.array(phantom.label.size) - 1) / 2)
    np.testing.assert_allclose(middle, 0, atol=1e-9)


def test_zones_lie_where_anatomy_has_them() -> None:
    for index in range(2):
        label = make_phantom(1, index).label.array
        at = {zone: ndimage.center_of_mass(label == zone) for zone in range(1, 5)}
        assert at[4][1] < at[2][1] < at[1][1]  # AFS in front of TZ in front of PZ
        assert at[3][0] < at[2][0]  # DPU below TZ
        for zone in range(1, 5):
            assert ndimage.label(label == zone, np.ones((3, 3, 3)))[1] <= (2 if zone == 3 else 1)


def test_sizes_are_those_that_were_drawn() -> None:
    for index in range(3):
        phantom = make_phantom(2, index)
        drawn, found = phantom.params, zone_volumes(phantom.label)
        ellipsoid = 4 / 3 * np.pi * drawn["ax"] * drawn["ay"] * drawn["az"] / 1000
        assert 0.8 < found["gland"] / ellipsoid < 1.1  # the apex tapers
        tube = np.pi * drawn["dpu"] ** 2 * drawn["az"] / 1000
        assert 0.5 < found["dpu"] / tube < 1.5
        seen = dice(phantom.label.array > 0, phantom.reader2.array > 0)
        assert 0.94 < seen < 1


def test_tissues_have_the_contrast_of_t2() -> None:
    phantom = make_phantom(0, 0)
    image, label = phantom.image.array, np.where(phantom.lesions.array, 0, phantom.label.array)
    mean = {zone: image[label == zone].mean() for zone in range(1, 5)}
    assert mean[1] > mean[3] > mean[4]
    assert mean[1] > mean[2] > mean[4]


def test_lesions_are_dark_and_inside_pz_or_tz() -> None:
    phantoms = [make_phantom(0, index) for index in range(4)]
    assert any(phantom.lesions.array.any() for phantom in phantoms)
    for phantom in phantoms:
        inside = phantom.lesions.array > 0
        assert set(np.unique(phantom.label.array[inside])) <= {1, 2}
        for zone in (1, 2):
            here = phantom.label.array == zone
            if np.count_nonzero(here & inside) > 20:
                image = phantom.image.array
                assert image[here & inside].mean() < image[here & ~inside].mean()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(16, 64\)"):
        make_phantom(0, 0, shape=(16, 64))


@pytest.mark.slow
def test_volumes_readers_and_mean_shape_are_those_of_the_reference() -> None:
    phantoms = [make_phantom(0, index) for index in range(48)]
    labels = np.stack([phantom.label.array for phantom in phantoms])
    readers = np.stack([phantom.reader2.array for phantom in phantoms])
    mean = np.mean([list(zone_volumes(p.label).values()) for p in phantoms], axis=0)
    np.testing.assert_allclose(mean[:4], [19.1, 8.7, 0.9, 3.6], rtol=0.07)
    overlap = [
        np.mean([dice(a == z, b == z) for a, b in zip(readers, labels, strict=True)])
        for z in range(1, 5)
    ]
    np.testing.assert_allclose(overlap, [0.948, 0.938, 0.851, 0.757], atol=0.03)
    distance = [
        np.nanmean([masd(a == z, b == z, SPACING) for a, b in zip(readers, labels, strict=True)])
        for z in range(1, 5)
    ]
    np.testing.assert_allclose(distance, [0.23, 0.30, 0.40, 0.67], atol=0.06)
    # Sixteen test cases of small zones: another stream of numbers moves DPU and AFS by 0.1.
    shape = np.stack([labels[:32] == z for z in range(5)]).mean(axis=1).argmax(axis=0)
    baseline = [np.mean([dice(shape == z, one == z) for one in labels[32:]]) for z in range(1, 5)]
    np.testing.assert_allclose(baseline[:2], [0.68, 0.71], atol=0.03)
    np.testing.assert_allclose(baseline[2:], [0.31, 0.26], atol=0.06)
