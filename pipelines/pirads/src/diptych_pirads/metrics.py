"""How well two masks agree: overlap, surface distances in mm, volumes; by zone and by third.

Surface distances have many forms that differ by a third, so the form is always named
(`Conventions`). The default is the one of MONAI: surface = mask minus its 6-connected erosion,
distances between voxel centres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage

from diptych_pirads.geometry import Box, Volume, bounding_box, reorient_lps, same_grid, to_grid
from diptych_pirads.labels import BG, PZ, SCHEMES, TZ, ZONES, LabelScheme
from diptych_pirads.volumetry import LEVELS, gland_levels

if TYPE_CHECKING:
    from diptych.statistics import Estimate

Mask = Bool[ndarray, "z y x"]
Surface = Literal["erosion6", "contour26", "uats_voxel"]
Average = Literal["pooled", "two_sided"]
Empty = Literal["nan", "zero"]

_CONNECTIVITY = {"erosion6": 1, "contour26": 3, "uats_voxel": 3}


@dataclass(frozen=True)
class Conventions:
    """What a figure means; papers differ in all of it.

    Args:
        surface: "erosion6": 6-connected inner boundary, mm. "contour26": 26-connected, mm.
            "uats_voxel": 26-connected, in voxels, as the public code of Meyer, Ghosh et al. 2021.
        average: "pooled": mean over the surface voxels of both masks. "two_sided": mean of the
            two directed means.
        empty: Distance where exactly one mask is empty: "nan" (undefined, counted as a miss) or
            "zero", the public code's, with which a zone that is never found is perfect.
        regions: Thirds of the reference "gland", or of the "image": of the joint extent of
            prediction and reference.
        tolerance_mm: For the surface Dice.
    """

    surface: Surface = "erosion6"
    average: Average = "pooled"
    empty: Empty = "nan"
    regions: Literal["gland", "image"] = "gland"
    tolerance_mm: float = 2.0


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distance from every surface voxel of one mask to the nearest of the other's.

    Args:
        a_to_b: One distance a surface voxel of the first mask, in mm.
        b_to_a: The same for the second mask.
        a_slice: Index along z of the first mask's surface voxels.
        b_slice: The same for the second mask.
    """

    a_to_b: Float[ndarray, " a"]
    b_to_a: Float[ndarray, " b"]
    a_slice: Int[ndarray, " a"]
    b_slice: Int[ndarray, " b"]

    def on_slices(self, chosen: Bool[ndarray, " z"]) -> SurfaceDistances:
        """The distances of the surface voxels on some slices, to the whole other surface."""
        a, b = chosen[self.a_slice], chosen[self.b_slice]
        return SurfaceDistances(self.a_to_b[a], self.b_to_a[b], self.a_slice[a], self.b_slice[b])


def dice(a: Mask, b: Mask) -> float:
    """Dice coefficient ``2|A and B| / (|A| + |B|)``.

    Args:
        a: (z, y, x).
        b: (z, y, x).

    Returns:
        In [0, 1]; 0 where exactly one mask is empty, NaN where both are.

    Example:
        >>> dice(np.array([[[True, False]]]), np.array([[[True, True]]])) == 2 / 3
        True
    """
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero(a & b) / total) if total else math.nan


def surface_distances(
    a: Mask, b: Mask, spacing: Sequence[float], surface: Surface = "erosion6"
) -> SurfaceDistances | None:
    """Distances between two surfaces; what is outside the array counts as background.

    Args:
        a: (z, y, x).
        b: (z, y, x).
        spacing: mm along z, y, x.
        surface: See `Conventions`.

    Returns:
        Distances in mm (voxels for "uats_voxel"); None where a mask is empty.

    Raises:
        ValueError: The masks differ in shape, or the spacing is not three positive numbers.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"masks have shapes {a.shape} and {b.shape}: bring both to one 3-D grid")
    if len(spacing) != 3 or not all(step > 0 for step in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}: pass three positive mm along z, y, x")
    box = bounding_box(a | b)
    if box is None or not a.any() or not b.any():
        return None
    structure = ndimage.generate_binary_structure(3, _CONNECTIVITY[surface])
    edge_a, edge_b = (_edge(mask[box], structure) for mask in (a, b))
    sampling = (1.0, 1.0, 1.0) if surface == "uats_voxel" else tuple(spacing)
    return SurfaceDistances(
        ndimage.distance_transform_edt(~edge_b, sampling=sampling)[edge_a],
        ndimage.distance_transform_edt(~edge_a, sampling=sampling)[edge_b],
        np.nonzero(edge_a)[0] + box[0].start,
        np.nonzero(edge_b)[0] + box[0].start,
    )


def masd(
    a: Mask,
    b: Mask,
    spacing: Sequence[float],
    average: Average = "pooled",
    surface: Surface = "erosion6",
    empty: Empty = "nan",
) -> float:
    """Mean absolute surface distance (MAD in Meyer et al., ISBI 2019).

    Args:
        a: (z, y, x).
        b: (z, y, x).
        spacing: mm along z, y, x.
        average: See `Conventions`.
        surface: See `Conventions`.
        empty: See `Conventions`.

    Returns:
        mm (voxels for "uats_voxel"); NaN where both masks are empty.

    Raises:
        ValueError: The masks differ in shape, or the spacing is not three positive numbers.

    Example:
        >>> a, b = np.zeros((2, 9, 4, 4), bool)
        >>> a[0, 0, 0] = b[7, 0, 0] = True
        >>> masd(a, b, (3, 1, 1))
        21.0
    """
    distances = surface_distances(a, b, spacing, surface)
    return _empty_value(a, b, empty) if distances is None else _mean(distances, average)


def hd95(a: Mask, b: Mask, spacing: Sequence[float], surface: Surface = "erosion6") -> float:
    """95 % Hausdorff distance: the larger of the two directed 95th percentiles.

    Args:
        a: (z, y, x).
        b: (z, y, x).
        spacing: mm along z, y, x.
        surface: See `Conventions`.

    Returns:
        mm (percentile by linear interpolation); NaN where a mask is empty.

    Raises:
        ValueError: The masks differ in shape, or the spacing is not three positive numbers.
    """
    distances = surface_distances(a, b, spacing, surface)
    return math.nan if distances is None else _percentile(distances)


def nsd(a: Mask, b: Mask, spacing: Sequence[float], tol: float = 2.0) -> float:
    """Surface Dice: the part of both surfaces' voxels that lies within a tolerance of the other.

    Args:
        a: (z, y, x).
        b: (z, y, x).
        spacing: mm along z, y, x.
        tol: Tolerance in mm.

    Returns:
        In [0, 1]; 0 where exactly one mask is empty, NaN where both are.

    Raises:
        ValueError: The masks differ in shape, or the spacing is not three positive numbers.
    """
    distances = surface_distances(a, b, spacing)
    if distances is None:
        return 0.0 if a.any() or b.any() else math.nan
    return _share_within(distances, tol)


def centerline_distance(a: Mask, b: Mask, spacing: Sequence[float]) -> float:
    """Mean distance of the centroids of two masks over the slices that hold both.

    Args:
        a: (z, y, x).
        b: (z, y, x).
        spacing: mm along z, y, x.

    Returns:
        mm in the plane of the slices; NaN where no slice holds both.
    """
    common = np.flatnonzero(a.any(axis=(1, 2)) & b.any(axis=(1, 2)))
    if not len(common):
        return math.nan
    shift = [
        np.subtract(ndimage.center_of_mass(a[z]), ndimage.center_of_mass(b[z])) for z in common
    ]
    return float(np.linalg.norm(np.multiply(shift, spacing[1:]), axis=1).mean())


def evaluate_case(
    pred: Volume,
    ref: Volume,
    scheme: str | LabelScheme = "zones4",
    pred_scheme: str | LabelScheme = "zones4",
    conventions: Conventions | None = None,
) -> dict[str, float]:
    """Every metric of one study against one reader, on the reader's own grid.

    A prediction on another grid is brought to the reference's by its nearest label. Zones that
    one side does not tell apart are merged on the other (TZ, AFS and DPU into TZ); what a
    scheme leaves open between PZ and TZ counts for the gland and is left out of both.

    Args:
        pred: (z, y, x) values of ``pred_scheme``.
        ref: (z, y, x) values of ``scheme``.
        scheme: What the reference's values mean: a key of `labels.SCHEMES`, or a scheme.
        pred_scheme: The same for the prediction.
        conventions: What the figures mean; None: the defaults of `Conventions`.

    Returns:
        For each zone that both tell apart and for "gland": ``dice/pz``, ``masd/pz``, ``hd95/pz``,
        ``nsd/pz``, ``volume_ml/pz`` (prediction), ``reference_ml/pz``, ``volume_error_ml/pz``
        (prediction minus reference),
        ``volume_error_percent/pz`` (of the reference), ``miss/pz`` (1 where the prediction alone
        is empty), ``absent/pz`` (1 where both are), ``masd_penalised/pz`` (half the diagonal of
        the reference gland's box where exactly one is empty), ``dice/pz/base`` and
        ``masd/pz/base`` with mid and apex; and ``centerline/dpu``. NaN where undefined.

    Raises:
        ValueError: An unknown scheme, or a volume with values that its scheme does not have.
    """
    conventions = conventions or Conventions()
    ref = reorient_lps(ref)
    pred = reorient_lps(pred)
    if not same_grid(pred, ref):
        pred = to_grid(pred, ref, "label")
    box = bounding_box((pred.array != 0) | (ref.array != 0)) or ...
    masks = compared_masks(pred.array[box], _scheme(pred_scheme), ref.array[box], _scheme(scheme))
    gland_pred, gland_ref = masks["gland"]
    extent = gland_ref | gland_pred if conventions.regions == "image" else gland_ref
    levels = gland_levels(extent)
    penalty = _half_diagonal(bounding_box(gland_ref), ref.spacing)
    row: dict[str, float] = {}
    for zone, (a, b) in masks.items():
        distances = surface_distances(a, b, ref.spacing, conventions.surface)
        whole = _overall(a, b, ref, distances, penalty, conventions)
        row |= {f"{metric}/{zone}": value for metric, value in whole.items()}
        for number, level in enumerate(LEVELS):
            chosen = levels == number
            there = None if distances is None else distances.on_slices(chosen)
            row[f"dice/{zone}/{level}"] = dice(a[chosen], b[chosen])
            row[f"masd/{zone}/{level}"] = (
                math.nan if there is None else _mean(there, conventions.average)
            )
    if "dpu" in masks:
        row["centerline/dpu"] = centerline_distance(*masks["dpu"], ref.spacing)
    return row


def bootstrap(
    values: Sequence[float], subjects: Sequence[str], n: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over patients with its percentile interval, for scores of one's own.

    Reports take the BCa interval of 10,000 resamples of `diptych.statistics` instead.

    Args:
        values: One score a study; NaN where there is none.
        subjects: The patient of each study: a patient's studies are averaged first.
        n: Resamples of patients.
        seed: Of the resampling.

    Returns:
        Mean, ends of the 95 % interval and number of patients; numbers are None, with a reason,
        where nothing can be resampled.

    Raises:
        ValueError: Values and subjects differ in number.

    Example:
        >>> bootstrap([0.8, 0.9, 0.7], ["a", "a", "b"]).value
        0.775
    """
    from scipy import stats

    from diptych.statistics import ONE_SUBJECT, UNDEFINED, Estimate

    known: dict[str, list[float]] = {}
    for value, subject in zip(values, subjects, strict=True):
        known.setdefault(subject, []).extend([value] if math.isfinite(value) else [])
    means = [float(np.mean(own)) for own in known.values() if own]
    if not means:
        return Estimate(None, None, None, 0, reason=UNDEFINED)
    if len(means) == 1:
        return Estimate(means[0], None, None, 1, reason=ONE_SUBJECT)
    interval = stats.bootstrap(
        (means,), np.mean, n_resamples=n, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(np.mean(means)), float(interval.low), float(interval.high), len(means))


def compared_masks(
    pred: Int[ndarray, "z y x"],
    pred_scheme: LabelScheme,
    ref: Int[ndarray, "z y x"],
    ref_scheme: LabelScheme,
) -> dict[str, tuple[Mask, Mask]]:
    """The masks that a prediction and a reference both know, gland last.

    Args:
        pred: (z, y, x) values of ``pred_scheme``.
        pred_scheme: What these values allow.
        ref: (z, y, x) values of ``ref_scheme``.
        ref_scheme: What these values allow.

    Returns:
        Mask of the prediction and of the reference by zone, in the order of `labels.ZONES`.

    Raises:
        ValueError: An array has values that its scheme does not have.
    """
    for array, scheme in ((pred, pred_scheme), (ref, ref_scheme)):
        unknown = sorted(set(np.unique(array).tolist()) - set(scheme.allowed))
        if unknown:
            raise ValueError(
                f"values {unknown} are not in label scheme {scheme.name}, which has "
                f"{sorted(scheme.allowed)}: choose the scheme of the file"
            )
    own, other = _names(pred_scheme), _names(ref_scheme)
    common = set(own.values()) & set(other.values())
    open_voxels = np.isin(pred, _unnamed(pred_scheme, own)) | np.isin(
        ref, _unnamed(ref_scheme, other)
    )
    own, other = _merged(own, ref_scheme, common), _merged(other, pred_scheme, common)
    masks = {
        ZONES[zone]: (
            np.isin(pred, [value for value, name in own.items() if name == zone]) & ~open_voxels,
            np.isin(ref, [value for value, name in other.items() if name == zone]) & ~open_voxels,
        )
        for zone in sorted(common)
    }
    return {**masks, "gland": (_gland(pred, pred_scheme), _gland(ref, ref_scheme))}


def _scheme(scheme: str | LabelScheme) -> LabelScheme:
    if isinstance(scheme, LabelScheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"label scheme is '{scheme}': choose one of {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


def _names(scheme: LabelScheme) -> dict[int, int]:
    """The one zone that a value stands for; a value open between PZ and TZ has none."""
    return {
        value: min(allowed)
        for value, allowed in scheme.allowed.items()
        if BG not in allowed and not {PZ, TZ} <= allowed
    }


def _unnamed(scheme: LabelScheme, names: Mapping[int, int]) -> list[int]:
    return [
        value
        for value, allowed in scheme.allowed.items()
        if BG not in allowed and value not in names
    ]


def _merged(names: Mapping[int, int], other: LabelScheme, common: set[int]) -> dict[int, int]:
    """Zones that the other side lacks go where it would put them, TZ before PZ."""
    named = sorted(_names(other).items(), key=lambda item: item[1] == TZ)
    homes = {zone: home for value, home in named for zone in other.allowed[value] - common}
    return {value: homes.get(zone, zone) for value, zone in names.items()}


def _gland(array: Int[ndarray, "z y x"], scheme: LabelScheme) -> Mask:
    inside = [value for value, allowed in scheme.allowed.items() if BG not in allowed]
    return np.isin(array, inside)


def _overall(
    a: Mask,
    b: Mask,
    ref: Volume,
    distances: SurfaceDistances | None,
    penalty: float,
    conventions: Conventions,
) -> dict[str, float]:
    size, truth = (np.count_nonzero(mask) * ref.voxel_ml for mask in (a, b))
    error = float(size - truth)
    one_empty = bool(size) != bool(truth)
    row = {
        "dice": dice(a, b),
        "masd": _empty_value(a, b, conventions.empty),
        "hd95": _empty_value(a, b, conventions.empty),
        "nsd": 0.0 if one_empty else math.nan,
        "volume_ml": float(size),
        "reference_ml": float(truth),
        "volume_error_ml": error,
        "volume_error_percent": 100 * error / float(truth) if truth else math.nan,
        "miss": float(bool(truth) and not size),
        "absent": float(not truth and not size),
        "masd_penalised": penalty if one_empty else math.nan,
    }
    if distances is not None:
        mean = _mean(distances, conventions.average)
        row |= {
            "masd": mean,
            "hd95": _percentile(distances),
            "nsd": _share_within(distances, conventions.tolerance_mm),
            "masd_penalised": mean,
        }
    return row


def _edge(mask: Mask, structure: Bool[ndarray, "3 3 3"]) -> Mask:
    edge: Mask = mask & ~ndimage.binary_erosion(mask, structure)
    return edge


def _mean(distances: SurfaceDistances, average: Average) -> float:
    sides = [side for side in (distances.a_to_b, distances.b_to_a) if len(side)]
    if not sides:
        return math.nan
    if average == "two_sided":
        return float(np.mean([side.mean() for side in sides]))
    return float(np.concatenate(sides).mean())


def _percentile(distances: SurfaceDistances) -> float:
    return float(max(np.percentile(side, 95) for side in (distances.a_to_b, distances.b_to_a)))


def _share_within(distances: SurfaceDistances, tolerance: float) -> float:
    both = np.concatenate([distances.a_to_b, distances.b_to_a])
    # Half a nanometre: 4 x 0.5 mm must count as 2 mm whatever the rounding of the header.
    return float(np.mean(both <= tolerance + 5e-7))


def _empty_value(a: Mask, b: Mask, empty: Empty) -> float:
    return 0.0 if empty == "zero" and (a.any() or b.any()) else math.nan


def _half_diagonal(box: Box | None, spacing: Sequence[float]) -> float:
    if box is None:
        return math.nan
    extent = [(part.stop - part.start) * step for part, step in zip(box, spacing, strict=True)]
    return float(np.linalg.norm(extent)) / 2
