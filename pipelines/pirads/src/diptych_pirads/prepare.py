"""Studies on one grid: series resampled and normalised, labels with their signed distances.

Whole series are kept; crops are cut when a batch is loaded. Nothing about an image depends on its
label, so that a study is prepared for prediction as it was for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int8, Integer, UInt8
from numpy import ndarray
from scipy import ndimage

from diptych.errors import DataError
from diptych.findings import Finding, Findings
from diptych_pirads.check import check_axial, check_image
from diptych_pirads.check_label import check_grid
from diptych_pirads.config import NormalizeSection, PiradsConfig, PiradsDataSection
from diptych_pirads.geometry import (
    Box,
    Volume,
    bounding_box,
    crop_pad,
    crop_start,
    field_of_view,
    reorient_lps,
    resample,
    resample_label,
    resampled_size,
    roi_from_three_series,
    to_grid,
)
from diptych_pirads.label_files import Label, open_label
from diptych_pirads.labels import UNSEEN, LabelScheme
from diptych_pirads.layout import Study
from diptych_pirads.read import Opened, open_volume, refuse
from diptych_pirads.register import LARGEST_DEGREES, LARGEST_MM, register

MARGIN_MM = 15.0  # around the gland, of labels and signed distances
REFERENCE_VOXELS = 2  # around the gland, of the label on its own grid
SDF_MM = 12.7
SDF_STEPS = 10  # a millimetre, so that the range fills int8
ADC_SCALE = 3000.0  # 1e-6 mm2/s; highest of living prostate tissue
ADC_SMALL = 10.0  # a median below can only be in units of 1e-3 mm2/s

Center = Literal["roi3", "label", "volume"]


@dataclass(frozen=True, eq=False)
class PreparedLabel:
    """One reader's label of a prepared study.

    Args:
        values: uint8 (z, y, x), file values on the working grid, cut to the gland and 15 mm.
        sdf: (V, z, y, x) on the same box, for each of `scheme.foreground` the signed distance to
            its border in tenths of a mm, positive inside, cut at 12.7 mm.
        seen: Voxels of the working grid that the mask's field of view reaches.
        scheme: What the values mean.
        reference: The label on its own grid, cut to the gland and 2 voxels; what is scored.
        field: That grid as a whole; its array is empty of meaning. A prediction is scored
            inside it, and only there.
        ceiling: File value -> Dice of the reference with itself after going to the working grid
            and back: no model on this grid can be expected to do better.
    """

    values: Volume
    sdf: Int8[ndarray, "v z y x"]
    seen: Box
    scheme: LabelScheme
    reference: Volume
    field: Volume
    ceiling: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class PreparedStudy:
    """A study as training, evaluation and prediction use it.

    Args:
        image: float32 (C, z, y, x), the whole series at the working spacing, normalised; missing
            channels are 0.
        present: Which channels exist.
        original: Grid of the T2-weighted series, axes nearest to left, posterior, superior; its
            array is empty of meaning.
        center: (3,), middle of the first crop in prediction, validation and test, LPS mm.
        training_center: (3,), middle of training crops before jitter, LPS mm.
        training_center_from: Where that comes from.
        label: None for an unlabelled study.
        findings: Warnings and notes.
    """

    image: Volume
    present: tuple[bool, ...]
    original: Volume
    center: Float[ndarray, " 3"]
    training_center: Float[ndarray, " 3"]
    training_center_from: Center
    label: PreparedLabel | None
    findings: tuple[Finding, ...] = ()


def prepare_study(row: Study, cfg: PiradsConfig) -> PreparedStudy:
    """Bring one study to the working grid.

    Axes are sorted without interpolation (a tilted series stays tilted), the series is resampled
    with its corners kept, the crop's middle is found, and intensities are normalised there.

    Args:
        row: The study.
        cfg: The configuration; its section `data` counts.

    Raises:
        DataError: The findings of a study that cannot be used.
    """
    data = cfg.data
    t2, findings = _open_series(row, "t2", data)
    geometry = data.geometry
    size = resampled_size(t2.size, t2.spacing, geometry.spacing, geometry.size_rounding)
    working = resample(t2, geometry.spacing, 1, size)
    shared = _shared_center(row, t2, data)
    center = _middle(working) if shared is None else shared
    label = None
    if row.label:
        opened = open_label(row, data.scheme, _stored(row, data))
        label, noted = _prepare_label(opened, t2, row, working)
        findings += noted
    training, origin = _training_center(data, shared, label, working, row)
    if label is not None:
        findings += _cut_by_crop(label, training, data, row)
    channels = [_normalized(working, center, data)]
    present = [True]
    for name in data.channels[1:]:
        channel, noted = _other_channel(row, name, working, center, data)
        channels.append(np.zeros(working.size, np.float32) if channel is None else channel)
        present.append(channel is not None)
        findings += noted
    return PreparedStudy(
        image=working.with_array(np.stack(channels)),
        present=tuple(present),
        original=grid_of(t2),
        center=center,
        training_center=training,
        training_center_from=origin,
        label=label,
        findings=tuple(findings),
    )


def crop_image(study: PreparedStudy, center: Float[ndarray, " 3"], size: Sequence[int]) -> Volume:
    """The crop of a study's channels that a network sees.

    Args:
        study: The study.
        center: Middle, LPS mm.
        size: Voxels along z, y, x.

    Returns:
        float32 (C, z, y, x), 0 beyond the series.
    """
    return crop_pad(study.image, center, size)


def crop_label(
    study: PreparedStudy, center: Float[ndarray, " 3"], size: Sequence[int]
) -> UInt8[ndarray, "z y x"]:
    """The crop of a study's label, on the grid of `crop_image`.

    Args:
        study: The study.
        center: Middle, LPS mm.
        size: Voxels along z, y, x.

    Returns:
        File values; `UNSEEN` where the mask's field of view does not reach, and everywhere in an
        unlabelled study. `scheme.to_sets` makes allowed classes of them.
    """
    values = np.full(tuple(size), UNSEEN, np.uint8)
    if study.label is None:
        return values
    first = crop_start(study.image, center, size)
    z, y, x = (
        slice(max(part.start - a, 0), max(part.stop - a, 0))
        for part, a in zip(study.label.seen, first, strict=True)
    )
    values[z, y, x] = crop_pad(study.label.values, center, size).array[z, y, x]
    return values


def grid_of(v: Volume) -> Volume:
    """A grid without values: they take no memory and mean nothing."""
    return v.with_array(np.broadcast_to(np.zeros((), bool), v.size))


def normalize(
    array: Float[ndarray, "z y x"], region: Float[ndarray, "*n"], how: NormalizeSection
) -> Float[ndarray, "z y x"]:
    """Map intensities by the statistics of a region.

    Args:
        array: Any finite values.
        region: The voxels that count, of the same image.
        how: "percentile" clips at two percentiles and maps them to [0, 1] (Meyer et al., ISBI
            2019), "nyul" does the same and leaves the rest to `scale`; "zscore" gives mean 0
            and standard deviation 1.

    Returns:
        float32 of the shape of `array`; 0 everywhere where the region is constant.
    """
    voxels = region[region != 0] if how.ignore_padding else region.ravel()
    if voxels.size == 0:
        return np.zeros(array.shape, np.float32)
    if how.mode == "zscore":
        offset, scale = float(voxels.mean()), float(voxels.std())
    else:
        low, high = np.percentile(voxels, [how.low, how.high])
        array = np.clip(array, low, high)
        offset, scale = float(low), float(high - low)
    if scale == 0:
        return np.zeros(array.shape, np.float32)
    normal: Float[ndarray, "z y x"] = ((array - offset) / scale).astype(np.float32)
    return normal


def signed_distances(
    values: Integer[ndarray, "z y x"], wanted: Sequence[int], spacing: Sequence[float]
) -> Int8[ndarray, "v z y x"]:
    """Signed distance to the border of each value's voxels, positive inside.

    Args:
        values: File values.
        wanted: The values.
        spacing: mm along z, y, x.

    Returns:
        Tenths of a mm, cut at 12.7 mm; -127 everywhere for a value that does not occur.
    """
    distances: Float[ndarray, "v z y x"] = np.full(
        (len(wanted), *values.shape), -SDF_MM, np.float32
    )
    for distance, value in zip(distances, wanted, strict=True):
        mask = values == value
        if mask.any() and not mask.all():
            inside = ndimage.distance_transform_edt(mask, spacing)
            distance[:] = inside - ndimage.distance_transform_edt(~mask, spacing)
    steps: Int8[ndarray, "v z y x"] = np.rint(
        np.clip(distances, -SDF_MM, SDF_MM) * SDF_STEPS
    ).astype(np.int8)
    return steps


def _stored(row: Study, data: PiradsDataSection) -> Volume | None:
    """The T2-weighted series as stored, which only slices without geometry need."""
    if (row.scheme or data.scheme) != "ucla_png":
        return None
    return _read(row.images["t2"], data).volume


def _read(path: Path, data: PiradsDataSection) -> Opened:
    return open_volume(path, data.series if path.is_dir() else None)


def _open_series(row: Study, role: str, data: PiradsDataSection) -> tuple[Volume, list[Finding]]:
    path = row.images[role]
    where = row.name_of(path)
    opened = _read(path, data)
    findings = [*opened.findings]
    findings += check_image(opened.volume, where, repair=data.repair_nan == "median")
    if role == "t2":
        findings += check_axial(opened.volume, where)
    _require_none(findings)
    v = reorient_lps(opened.volume)
    array = v.array.astype(np.float32)
    broken = ~np.isfinite(array)
    for n in np.flatnonzero(broken.any(axis=(1, 2))):
        rest = array[n][~broken[n]]
        array[n][broken[n]] = np.median(rest) if rest.size else 0
    return v.with_array(array), findings


def _require_none(findings: Sequence[Finding]) -> None:
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("\n".join(one.line() for one in errors), Findings(tuple(findings)))


def _shared_center(row: Study, t2: Volume, data: PiradsDataSection) -> Float[ndarray, " 3"] | None:
    """The middle of what three series share; None where it cannot or shall not be had."""
    if data.crop.center not in ("auto", "roi3"):
        return None
    where = row.name_of(row.images["t2"])
    if not {"sag", "cor"} <= set(row.images):
        if data.crop.center == "auto":
            return None
        fix = "add them to the manifest, or set data.crop.center=auto"
        raise refuse("E100", where, "data.crop.center=roi3 needs the series sag and cor", fix)
    sag, cor = (_read(row.images[role], data).volume for role in ("sag", "cor"))
    try:
        return roi_from_three_series(t2, sag, cor).center_lps
    except ValueError as error:
        fix = "give series of one examination, or leave sag and cor out"
        raise refuse("E106", where, str(error), fix) from None


def _training_center(
    data: PiradsDataSection,
    shared: Float[ndarray, " 3"] | None,
    label: PreparedLabel | None,
    working: Volume,
    row: Study,
) -> tuple[Float[ndarray, " 3"], Center]:
    if shared is not None:
        return shared, "roi3"
    if label is not None and data.crop.center in ("auto", "label"):
        box = _gland_box(label.values.array, label.scheme, row)
        ends = np.array([[part.start, part.stop - 1] for part in box])
        return label.values.to_lps(ends.mean(axis=1)), "label"
    return _middle(working), "volume"


def _middle(v: Volume) -> Float[ndarray, " 3"]:
    return v.to_lps((np.array(v.size) - 1) / 2)


def _prepare_label(
    label: Label, t2: Volume, row: Study, working: Volume
) -> tuple[PreparedLabel, list[Finding]]:
    where = row.name_of(row.label[0])
    findings = [*label.findings, *check_grid(label.volume, t2, where)]
    _require_none(findings)
    same = label.volume.size == t2.size and all(f.code != "W106" for f in findings)
    on_t2 = t2.with_array(label.volume.array) if same else to_grid(label.volume, t2, "label")
    whole = resample_label(on_t2, working.spacing, working.size)
    gland = _gland_box(whole.array, label.scheme, row)
    ends = [np.array([part.start, part.stop - 1]) for part in gland]
    size = [
        int(b - a + 1 + 2 * np.ceil(MARGIN_MM / mm))
        for (a, b), mm in zip(ends, working.spacing, strict=True)
    ]
    values = crop_pad(whole, whole.to_lps(np.array([end.mean() for end in ends])), size)
    everything = np.ones(working.size, bool)
    seen = bounding_box(everything if same else field_of_view(label.volume, working))
    assert seen is not None  # the gland lies in it
    own = t2.with_array(label.volume.array) if same else label.volume
    reference = _reference(own, label, row)
    prepared = PreparedLabel(
        values,
        signed_distances(values.array, label.scheme.foreground, values.spacing),
        seen,
        label.scheme,
        reference,
        grid_of(own),
        _ceiling(values, reference, label.scheme),
    )
    return prepared, findings


def _reference(v: Volume, label: Label, row: Study) -> Volume:
    z, y, x = _gland_box(v.array, label.scheme, row)
    size = [part.stop - part.start + 2 * REFERENCE_VOXELS for part in (z, y, x)]
    middle = np.array([(part.start + part.stop - 1) / 2 for part in (z, y, x)])
    return crop_pad(v, v.to_lps(middle), size)


def _ceiling(values: Volume, reference: Volume, scheme: LabelScheme) -> dict[int, float]:
    known = (0, *scheme.foreground)
    shares = np.stack([values.array == value for value in known]).astype(np.float32)
    back = to_grid(values.with_array(shares), reference, "prob").array.argmax(0)
    dice = {}
    for position, value in enumerate(known[1:], 1):
        a, b = back == position, reference.array == value
        if b.any():
            dice[value] = float(2 * (a & b).sum() / (a.sum() + b.sum()))
    return dice


def _gland_box(array: Integer[ndarray, "z y x"], scheme: LabelScheme, row: Study) -> Box:
    box = bounding_box(np.isin(array, scheme.foreground))
    if box is None:
        fix = "give the right file, or leave the label empty in the manifest"
        raise refuse("E109", row.name_of(row.label[0]), "the label is empty in the image", fix)
    return box


def _cut_by_crop(
    label: PreparedLabel, center: Float[ndarray, " 3"], data: PiradsDataSection, row: Study
) -> list[Finding]:
    """W112: how many mm of the gland a crop at its centre leaves out."""
    v = label.values
    box = _gland_box(v.array, label.scheme, row)
    middle = v.to_index(center)
    half = np.array(data.geometry.size) / 2
    first = middle - half
    lost = [
        (max(low - (part.start - 0.5), 0) + max(part.stop - 0.5 - (low + n), 0)) * mm
        for part, low, n, mm in zip(box, first, data.geometry.size, v.spacing, strict=True)
    ]
    worst = int(np.argmax(lost))
    if lost[worst] <= v.spacing[worst] / 2:
        return []
    found = f"the crop leaves out {lost[worst]:.1f} mm of the gland along {'zyx'[worst]}"
    fix = "nothing, or a larger data.geometry.size"
    return [Finding("warning", "W112", row.name_of(row.label[0]), found, fix)]


def _region(v: Volume, center: Float[ndarray, " 3"], size: Sequence[int]) -> Float[ndarray, "*n"]:
    """The voxels of a crop that the series has."""
    first = crop_start(v, center, size)
    z, y, x = (slice(max(a, 0), max(a + n, 0)) for a, n in zip(first, size, strict=True))
    return v.array[z, y, x]


def _normalized(
    v: Volume, center: Float[ndarray, " 3"], data: PiradsDataSection
) -> Float[ndarray, "z y x"]:
    return normalize(v.array, _region(v, center, data.geometry.size), data.normalize)


def _other_channel(
    row: Study,
    name: str,
    working: Volume,
    center: Float[ndarray, " 3"],
    data: PiradsDataSection,
) -> tuple[Float[ndarray, "z y x"] | None, list[Finding]]:
    if name not in row.images:
        return None, []
    series, findings = _open_series(row, name, data)
    if data.registration == "rigid":
        series, moved = _registered(series, working, center, data, row.name_of(row.images[name]))
        findings.append(moved)
    seen = to_grid(series, working, "image")
    if name != "adc":
        return _normalized(seen, center, data), findings
    values = series.array[series.array > 0]
    array = seen.array
    if values.size and np.median(values) < ADC_SMALL:
        array = array * 1000
        found = f"ADC with a median of {np.median(values):.2g} is taken as 1e-3 mm2/s"
        fix = "nothing: it is multiplied by 1000"
        findings.append(Finding("warning", "W120", row.name_of(row.images[name]), found, fix))
    return (array / ADC_SCALE).astype(np.float32), findings


def _registered(
    series: Volume,
    working: Volume,
    center: Float[ndarray, " 3"],
    data: PiradsDataSection,
    where: str,
) -> tuple[Volume, Finding]:
    motion = register(series, crop_pad(working, center, data.geometry.size), center)
    if motion is None:
        found = "registration finds no better place than the header's: it stays there"
        return series, Finding("note", "I125", where, found, "nothing")
    words = f"{motion.mm:.1f} mm and {motion.degrees:.1f} degrees"
    if motion.plausible:
        found = f"registered to the T2-weighted series: moved by {words}"
        return motion.undone(series), Finding("note", "I125", where, found, "nothing")
    found = (
        f"registration would move it by {words}, more than {LARGEST_MM:g} mm or "
        f"{LARGEST_DEGREES:g} degrees: it stays where its header puts it"
    )
    fix = "look whether it is of this examination, or set data.registration=none"
    return series, Finding("warning", "W125", where, found, fix)
