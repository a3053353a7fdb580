"""Time of distances, post-processing and crops against straight ports of the public code.

    python tools/bench/pirads_ops.py [--rounds 3] [--slices 24] [--matrix 512] [--json FILE]

The public forms are those of Meyer, Ghosh et al. (2021, distances, crops) and Meyer et al. (ISBI
2019, post-processing), written anew on the library calls that they use. Both forms have to agree
before they are timed; they run in turn and the fastest round of each counts. Only ratios within
one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from numpy import ndarray
from scipy import ndimage

from diptych.randomness import Draw
from diptych_pirads.augment import Crop, Warp, draw_warps, warp_crop
from diptych_pirads.config import ViewsSection
from diptych_pirads.geometry import Volume, bounding_box, crop_pad, resample_label
from diptych_pirads.labels import SCHEMES
from diptych_pirads.metrics import surface_distances
from diptych_pirads.phantom import make_phantom
from diptych_pirads.post import postprocess_zones
from diptych_pirads.prepare import MARGIN_MM, PreparedLabel, PreparedStudy, signed_distances

WORKING_GRID = (32, 168, 168)
WORKING_SPACING = (3.0, 0.5, 0.5)
CHANNELS = (1, 2, 3, 4, 0)  # the public code's order
CLEAN_AGREEMENT = 0.999
CROP_AGREEMENT = 0.99  # the maps differ by half a voxel in where a border lies
BORDER_ASIDE = 0.97  # voxels; half a voxel within the series' border one fades to 0, one repeats


def public_distances(a: ndarray, b: ndarray, spacing: tuple[float, float, float]) -> ndarray:
    """Surface distances by distance maps of the whole volume.

    Args:
        a: (z, y, x) mask.
        b: (z, y, x) mask.
        spacing: mm along z, y, x.

    Returns:
        Distances of both surfaces' voxels in mm, one after the other.
    """
    contours, maps = [], []
    for mask in (a, b):
        image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        contour = SimpleITK.BinaryContour(image, fullyConnected=True)
        distance = SimpleITK.DanielssonDistanceMap(
            contour, inputIsBinary=True, squaredDistance=False, useImageSpacing=True
        )
        contours.append(SimpleITK.GetArrayFromImage(contour).astype(bool))
        maps.append(SimpleITK.GetArrayFromImage(distance))
    return np.concatenate([maps[1][contours[0]], maps[0][contours[1]]])


def own_distances(a: ndarray, b: ndarray, spacing: tuple[float, float, float]) -> ndarray:
    """The same by `metrics.surface_distances`."""
    distances = surface_distances(a, b, spacing, "contour26")
    assert distances is not None
    return np.concatenate([distances.a_to_b, distances.b_to_a])


def public_cleaning(prob: ndarray) -> ndarray:
    """Largest piece of each channel, then a visit to every voxel.

    Args:
        prob: (5, z, y, x) class probabilities.

    Returns:
        (z, y, x) class numbers.
    """
    pieces = {number: largest_piece((prob[number] >= 0.5).astype(np.uint8)) for number in CHANNELS}
    removed = sum(
        SimpleITK.GetImageFromArray((prob[number] >= 0.5).astype(np.uint8)) - pieces[number]
        for number in CHANNELS
    )
    maps = [
        SimpleITK.SignedMaurerDistanceMap(
            pieces[number], insideIsPositive=True, squaredDistance=False, useImageSpacing=False
        )
        for number in CHANNELS
    ]
    label = np.zeros(prob.shape[1:], np.uint8)
    for number in CHANNELS[:-1]:
        label[SimpleITK.GetArrayFromImage(pieces[number]) > 0] = number
    width, height, depth = removed.GetSize()
    for x in range(width):
        for y in range(height):
            for z in range(depth):
                if removed[x, y, z] > 0:
                    scores = [distance[x, y, z] for distance in maps]
                    label[z, y, x] = CHANNELS[scores.index(max(scores))]
    return label


def largest_piece(mask: ndarray) -> Any:
    """The largest 6-connected piece of a mask as an image."""
    pieces = SimpleITK.ConnectedComponent(SimpleITK.GetImageFromArray(mask))
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(pieces)
    largest = max(shape.GetLabels(), key=shape.GetNumberOfPixels, default=1)
    return SimpleITK.BinaryThreshold(pieces, largest, largest)


def public_crop(image: ndarray, label: ndarray, warp: Warp) -> tuple[ndarray, ndarray]:
    """Distance maps of all classes; each goes through the transform, then to the reference grid.

    Args:
        image: (z, y, x) intensities on the working grid.
        label: (z, y, x) class numbers.
        warp: About the middle of the grid.

    Returns:
        Intensities and class numbers, warped.
    """
    middle = np.multiply(np.subtract(WORKING_GRID, 1), WORKING_SPACING) / 2
    affine = SimpleITK.AffineTransform(3)
    affine.SetMatrix(warp.matrix[::-1, ::-1].ravel().tolist())
    affine.SetCenter(middle[::-1].tolist())
    affine.SetTranslation(warp.shift[::-1].tolist())
    whole = SimpleITK.CompositeTransform([SimpleITK.AffineTransform(3), affine])

    def warped(source: Any, outside: float) -> ndarray:
        source.SetSpacing(WORKING_SPACING[::-1])
        once = SimpleITK.Resample(source, source, whole, SimpleITK.sitkLinear, outside)
        again = SimpleITK.Resample(
            once, source, SimpleITK.Transform(), SimpleITK.sitkLinear, outside
        )
        return SimpleITK.GetArrayFromImage(again)

    distances = np.zeros((*WORKING_GRID, len(CHANNELS)))
    for number in range(len(CHANNELS)):
        mask = SimpleITK.GetImageFromArray((label == number).astype(np.int64))
        mask.SetSpacing(WORKING_SPACING[::-1])
        distance = SimpleITK.SignedMaurerDistanceMap(
            mask, insideIsPositive=True, squaredDistance=False, useImageSpacing=True
        )
        distances[..., number] = warped(distance, 0.0 if number == 0 else -1e3)
    return warped(SimpleITK.GetImageFromArray(image), 0.0), distances.argmax(-1)


def prepared_study() -> PreparedStudy:
    """A generated study as the prepared folder keeps it, on the grid of the `paper` recipe."""
    phantom = make_phantom(0, 0, WORKING_GRID, WORKING_SPACING)
    scheme, box = SCHEMES["zones4"], bounding_box(phantom.label.array > 0)
    assert box is not None
    ends = np.array([[part.start, part.stop - 1] for part in box])
    margin = np.ceil(MARGIN_MM / np.array(WORKING_SPACING)).astype(int)
    gland = phantom.label.to_lps(ends.mean(axis=1))
    values = crop_pad(phantom.label, gland, ends[:, 1] - ends[:, 0] + 1 + 2 * margin)
    seen = (slice(0, WORKING_GRID[0]), slice(0, WORKING_GRID[1]), slice(0, WORKING_GRID[2]))
    sdf = signed_distances(values.array, scheme.foreground, WORKING_SPACING)
    label = PreparedLabel(values, sdf, seen, scheme, phantom.label, phantom.label, {})
    center = phantom.label.to_lps((np.array(WORKING_GRID) - 1) / 2)
    image = phantom.image.with_array(phantom.image.array[None].astype(np.float16))
    return PreparedStudy(image, (True,), phantom.label, center, center, "volume", label)


def fastest(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each form; the forms take turns."""
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def readers(slices: int, matrix: int) -> tuple[ndarray, ndarray]:
    """Peripheral zone by two readers in a field of view as scanners give it."""
    phantom = make_phantom(0, 0, shape=(slices, 128, 128), spacing=(3.0, 0.5, 0.5))
    masks = []
    for volume in (phantom.label, phantom.reader2):
        side = matrix - 128
        margins = ((0, 0), (side // 2, side - side // 2), (side // 2, side - side // 2))
        masks.append(np.pad(volume.array == 1, margins))
    return masks[0], masks[1]


def working_label() -> ndarray:
    """Truth of a generated study on the working grid of the `paper` recipe."""
    truth = make_phantom(0, 0).label
    fine: Volume = resample_label(truth, WORKING_SPACING)
    margins = [(0, max(w - n, 0)) for w, n in zip(WORKING_GRID, fine.size, strict=True)]
    return np.pad(fine.array, margins)[tuple(slice(n) for n in WORKING_GRID)]


def compare_distances(slices: int, matrix: int, rounds: int) -> dict[str, Any]:
    """Both forms of the distances: first equal, then timed."""
    a, b = readers(slices, matrix)
    spacing = (3.0, 0.5, 0.5)
    public, own = public_distances(a, b, spacing), own_distances(a, b, spacing)
    # Danielsson's map is an approximation.
    np.testing.assert_allclose(own.mean(), public.mean(), atol=2e-3)
    np.testing.assert_allclose(np.percentile(own, 95), np.percentile(public, 95), atol=1e-2)
    seconds = fastest(
        {
            "public": lambda: public_distances(a, b, spacing),
            "own": lambda: own_distances(a, b, spacing),
        },
        rounds,
    )
    return {"case": f"surface distances, {slices} x {matrix} x {matrix}", **seconds}


def compare_cleaning(rounds: int) -> dict[str, Any]:
    """Both forms of the post-processing: the same on clean input, then timed on noisy input."""
    label = working_label()
    certain = np.stack([label == number for number in range(5)]).astype(np.float32)
    clean = 0.9 * certain + 0.02
    agreement = float((postprocess_zones(clean, WORKING_SPACING) == public_cleaning(clean)).mean())
    assert agreement >= CLEAN_AGREEMENT, f"only {agreement:.4%} of the voxels agree"
    draw = np.random.default_rng(0).standard_normal(clean.shape)
    noise = ndimage.gaussian_filter(draw, (0, 0.5, 1.5, 1.5))
    noisy = clean + np.float32(0.3) * (noise / noise.std()).astype(np.float32)
    for kind in ("meyer", "diptych"):
        cleaned = postprocess_zones(noisy, WORKING_SPACING, kind)
        same = float((cleaned == public_cleaning(noisy)).mean())
        print(f"noisy input, {kind}: {same:.4%} of the voxels as the public form")
        assert kind == "diptych" or same == 1.0
    seconds = fastest(
        {
            "public": lambda: public_cleaning(noisy),
            "own": lambda: postprocess_zones(noisy, WORKING_SPACING),
        },
        rounds,
    )
    return {"case": f"post-processing, {WORKING_GRID}", "agreement": agreement, **seconds}


def compare_crops(rounds: int) -> dict[str, Any]:
    """Both forms of a training crop: nearly the same labels, then timed."""
    study = prepared_study()
    assert study.label is not None
    image = study.image.array[0].astype(np.float32)
    label = study.label.reference.array
    warp = draw_warps(Draw(0), [0], ViewsSection(), (6.0, 4.0, 4.0))[0]
    own, (warped, classes) = warp_crop(study, warp, WORKING_GRID), public_crop(image, label, warp)
    seen = own.sets.numpy() != 0b11111
    agreement = float(((1 << classes) == own.sets.numpy())[seen].mean())
    assert agreement >= CROP_AGREEMENT, f"only {agreement:.4%} of the voxels agree"
    near = np.abs(own.image[0].numpy() - warped) < 2e-2
    assert near[seen].mean() > BORDER_ASIDE, "the images differ"

    def crop() -> Crop:
        return warp_crop(study, warp, WORKING_GRID)

    def label_only() -> Crop:
        return warp_crop(study, warp, WORKING_GRID, distances=False)

    forms = {
        "public": lambda: public_crop(image, label, warp),
        "own": label_only,
        "own_with_distances": crop,
    }
    seconds = fastest(forms, rounds)
    return {"case": f"training crop, {WORKING_GRID}", "agreement": agreement, **seconds}


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--matrix", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
    rows = [
        compare_distances(options.slices, options.matrix, options.rounds),
        compare_cleaning(options.rounds),
        compare_crops(options.rounds),
    ]
    for row in rows:
        row["ratio"] = row["public"] / row["own"]
        print(
            f"{row['case']}: public {row['public']:.3f} s, own {row['own']:.3f} s, "
            f"{row['ratio']:.0f} times as fast"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
