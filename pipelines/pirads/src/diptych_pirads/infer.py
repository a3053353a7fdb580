"""One study through a network: crop around the gland, both mirror images, clean zones.

Validation, test and prediction all come through here, so that what is measured is what a user gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped
from numpy import ndarray
from scipy import ndimage
from torch import Tensor, nn

from diptych.contract import Facts
from diptych_pirads.config import PiradsConfig
from diptych_pirads.geometry import Volume, bounding_box, crop_start, cut, field_of_view
from diptych_pirads.labels import ZONES
from diptych_pirads.metrics import dice
from diptych_pirads.model import ZoneProbabilities, probabilities
from diptych_pirads.post import postprocess_zones, to_original_grid
from diptych_pirads.prepare import PreparedStudy, crop_image

LIKELY = 0.5  # from this probability on a voxel counts as gland, or as a path's zone
_FACES = ndimage.generate_binary_structure(3, 1)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a network says about one study.

    Args:
        prob: float32 (5, z, y, x), class probabilities on the crop of the working grid.
        zones: uint8 (z, y, x), class numbers 0 to 4 after post-processing, on `study.original`.
        disagreement: 1 - Dice of the two paths' masks, by common zone; NaN where neither has the
            zone; empty for networks of one path.
        difference: (z, y, x) on the grid of `prob`, largest difference of the paths' probabilities
            over the common zones; None for networks of one path.
        entropy: Mean entropy of `prob` in the gland, nats, at most ln 5; NaN without gland.
        components: 6-connected pieces of the gland before post-processing, those under
            `predict.least_piece_ml` apart.
        center: (3,), middle of the crop, LPS mm.
        features: Means of the bottleneck's feature maps over the crop; empty where unknown.
    """

    prob: Volume
    zones: Volume
    disagreement: Mapping[str, float]
    difference: Volume | None
    entropy: float
    components: int
    center: Float[ndarray, " 3"]
    features: Float32[ndarray, " f"]


def segment(
    module: nn.Module, study: PreparedStudy, config: PiradsConfig, facts: Facts
) -> Segmentation:
    """Segment one study without looking at its label.

    Args:
        module: A network that `model.probabilities` knows.
        study: Prepared as the training studies were.
        config: The section `predict` counts, and `data.crop.center`.
        facts: Those of the fit; "size" is the crop along z, y, x.

    Returns:
        Probabilities on the working grid, zones on the original one, and how sure the network is.

    Example:
        ``segment(trained.modules("final")["model"], study, config, trained.facts("final")).zones``
    """
    size = [int(n) for n in facts["size"]]
    with _evaluating(module):
        center = locate_gland(module, study, config, size)
        seen = _forward(module, study, center, size, config.predict.tta == "flip")
    crop = crop_image(study, center, size)
    prob = crop.with_array(_first(seen.fused))
    label = prob.array.argmax(axis=0)
    difference = None
    disagreement = {}
    if seen.a is not None and seen.b is not None:
        disagreement = {
            zone: 1 - dice(_first(seen.a[zone]) >= LIKELY, _first(seen.b[zone]) >= LIKELY)
            for zone in seen.a
        }
        apart = [np.abs(_first(seen.a[zone]) - _first(seen.b[zone])) for zone in seen.a]
        difference = crop.with_array(np.max(apart, axis=0))
    return Segmentation(
        prob=prob,
        zones=zones_on_original(prob, study.original, config),
        disagreement=disagreement,
        difference=difference,
        entropy=_mean_entropy(prob.array, label > 0),
        components=count_pieces(label > 0, prob.voxel_ml, config.predict.least_piece_ml),
        center=center,
        features=np.zeros(0, np.float32) if seen.features is None else _first(seen.features),
    )


def locate_gland(
    module: nn.Module, study: PreparedStudy, config: PiradsConfig, size: Sequence[int]
) -> Float[ndarray, " 3"]:
    """Middle of the crop in which a study is segmented.

    What three series share is taken as it is, and so is the series' middle where
    `data.crop.center` asks for it. Else the crop moves to the gland that the network finds, until
    it stays or `predict.passes` are used up; the last pass is the segmentation itself.

    Args:
        module: The network, in evaluation mode.
        study: The study.
        config: The sections `predict` and `data.crop`.
        size: Voxels of the crop along z, y, x.

    Returns:
        (3,), LPS mm; `study.center` where the network finds no gland.
    """
    center = study.center
    if study.training_center_from == "roi3" or config.data.crop.center == "volume":
        return center
    for _ in range(config.predict.passes - 1):
        seen = _forward(module, study, center, size, mirrored=False)
        crop = crop_image(study, center, size)
        found = _centroid(1 - _first(seen.fused)[0])
        if found is None:
            return center
        moved = crop.to_lps(found)
        stays = np.array_equal(
            crop_start(study.image, moved, size), crop_start(study.image, center, size)
        )
        center = moved
        if stays:
            break
    return center


def count_pieces(gland: Bool[ndarray, "z y x"], voxel_ml: float, least_ml: float) -> int:
    """How many pieces a gland comes in, crumbs apart.

    Args:
        gland: The gland before cleaning.
        voxel_ml: Volume of a voxel in mL.
        least_ml: Smaller 6-connected pieces do not count.

    Returns:
        0 without gland; else 1 or more, since the largest piece counts whatever its size.
    """
    pieces, count = ndimage.label(gland, _FACES)
    if not count:
        return 0
    sizes = np.bincount(pieces.ravel())[1:] * voxel_ml
    return max(1, int(np.count_nonzero(sizes >= least_ml)))


def zones_on_original(prob: Volume, original: Volume, config: PiradsConfig) -> Volume:
    """Clean class numbers on the grid of the series, from probabilities on the working grid.

    Args:
        prob: (5, z, y, x).
        original: The series; its values are not looked at.
        config: `predict.postprocess` and `predict.resample`. "meyer" cleans on the working grid,
            as their code does; "diptych" what is written, so that it is one piece there too.

    Returns:
        uint8 (z, y, x) on the grid of ``original``, 0 beyond the working grid.
    """
    kind = config.predict.postprocess
    zones = np.zeros(original.size, np.uint8)
    box = bounding_box(field_of_view(prob, original))
    if box is None:
        return original.with_array(zones)
    if kind == "meyer":
        clean = postprocess_zones(prob.array, prob.spacing, "meyer")
        hot = np.stack([clean == number for number in range(len(ZONES))])
        prob = prob.with_array(hot.astype(np.float32))
    part = cut(original, box)
    label = to_original_grid(prob, part, config.predict.resample).array
    zones[box] = (
        postprocess_zones(label, original.spacing, "diptych") if kind == "diptych" else label
    )
    return original.with_array(zones)


def _forward(
    module: nn.Module,
    study: PreparedStudy,
    center: Float[ndarray, " 3"],
    size: Sequence[int],
    mirrored: bool,
) -> ZoneProbabilities:
    """Probabilities of one crop, n = 1; if wanted the mean with those of its mirror image."""
    array = np.ascontiguousarray(crop_image(study, center, size).array, np.float32)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    x = torch.from_numpy(array)[None].to(device)
    if mirrored:
        x = torch.cat([x, x.flip(-1)])
    with torch.inference_mode():
        seen = probabilities(module, x)
    if not mirrored:
        return seen

    def mean(map_: Shaped[Tensor, "2 ..."]) -> Shaped[Tensor, "1 ..."]:
        return (map_[:1] + map_[1:].flip(-1)) / 2

    a, b = (
        None if path is None else {zone: mean(map_) for zone, map_ in path.items()}
        for path in (seen.a, seen.b)
    )
    return ZoneProbabilities(mean(seen.fused), a, b, seen.features)


def _first(map_: Shaped[Tensor, "n ..."]) -> Float32[ndarray, "*rest"]:
    array: Float32[ndarray, "*rest"] = map_[0].float().cpu().numpy()
    return array


def _centroid(gland: Float32[ndarray, "z y x"]) -> Float[ndarray, " 3"] | None:
    """Index of the middle of the probable gland's largest piece; None where there is none."""
    pieces, count = ndimage.label(gland >= LIKELY, _FACES)
    if not count:
        return None
    largest = 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    weights = np.where(pieces == largest, gland, 0)
    return np.asarray(ndimage.center_of_mass(weights))


def _mean_entropy(prob: Float32[ndarray, "5 z y x"], gland: Bool[ndarray, "z y x"]) -> float:
    inside = prob[:, gland].astype(np.float64)
    if not inside.size:
        return float("nan")
    return float(-(inside * np.log(np.maximum(inside, 1e-12))).sum(axis=0).mean())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
