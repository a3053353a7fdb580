"""The configuration of ``pirads``: every value, its unit and its default (the recipe ``fast``).

Axes are z, y, x: slices from feet to head, rows from front to back, columns to the patient's left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from diptych.config import AT_PREDICT, DataSection, PipelineConfig, Section

Scheme = Literal[
    "auto",
    "zones4",
    "pz_tz",
    "msd05",
    "prostate158",
    "gland",
    "ucla_png",
    "prostatezones",
    "prostatex_masks",
]
Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Grid = tuple[PositiveInt, PositiveInt, PositiveInt]
HALVINGS = (2, 8, 8)  # three in-plane poolings and one through-plane


class GeometrySection(Section):
    """The grid on which the network works."""

    spacing: Triple = Field((3.0, 0.75, 0.75), description="Voxel size along z, y, x in mm.")
    size: Grid = Field((24, 112, 112), description="Voxels of a crop along z, y, x.")
    size_rounding: Literal["round", "floor"] = Field(
        "round", description="Voxels of a resampled series; floor: as Meyer et al. 2019."
    )

    @model_validator(mode="after")
    def _poolings_divide_the_crop(self) -> GeometrySection:
        for axis, size, factor in zip("zyx", self.size, HALVINGS, strict=True):
            if size % factor:
                near = max(factor, round(size / factor) * factor)
                raise ValueError(
                    f"size {size} along {axis} is no multiple of {factor}: take {near}"
                )
        return self


class CropSection(Section):
    """Where a crop is taken."""

    center: Literal["auto", "roi3", "label", "localizer", "volume"] = Field(
        "auto",
        description="Middle of a training crop; auto: what axial, sagittal and coronal series "
        "share, else the label, else the volume.",
    )
    jitter_mm: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (6.0, 8.0, 8.0), description="Largest shift of a training crop along z, y, x in mm."
    )


class NormalizeSection(Section):
    """Intensities, from the voxels of a crop-sized box that no label chooses."""

    mode: Literal["percentile", "zscore"] = Field(
        "percentile", description="percentile: to [0, 1]; zscore: mean 0, standard deviation 1."
    )
    low: float = Field(1.0, ge=0, lt=100, description="Percentile that becomes 0.")
    high: float = Field(99.0, gt=0, le=100, description="Percentile that becomes 1.")
    ignore_padding: bool = Field(True, description="Voxels of exactly 0 do not count.")

    @model_validator(mode="after")
    def _low_is_lower(self) -> NormalizeSection:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class PiradsDataSection(DataSection):
    """Which series and labels are read, and how they are brought to one grid."""

    channels: tuple[Literal["t2", "adc", "hbv"], ...] = Field(
        ("t2",), description="Series that the network sees, T2-weighted first."
    )
    scheme: Scheme = Field(
        "auto", description="What label values mean where the manifest does not say; auto: guessed."
    )
    series: str | None = Field(
        None,
        description="DICOM folders with several series: a SeriesInstanceUID or a pattern of the "
        "description, such as *t2*tra*.",
        json_schema_extra=AT_PREDICT,
    )
    strict: bool = Field(False, description="Zones that look exchanged are an error.")
    repair_nan: Literal["off", "median"] = Field(
        "off",
        description="Voxels that are no number: an error, or the median of their slice.",
        json_schema_extra=AT_PREDICT,
    )
    same_studies: Path | None = Field(
        None, description="JSON (or .json.gz) that maps studies of one data set to another's."
    )
    geometry: GeometrySection = Field(GeometrySection(), description="Working grid.")
    crop: CropSection = Field(CropSection(), description="Crops.")
    normalize: NormalizeSection = Field(NormalizeSection(), description="Intensities.")

    @model_validator(mode="after")
    def _t2_comes_first(self) -> PiradsDataSection:
        if self.channels[:1] != ("t2",) or len(set(self.channels)) != len(self.channels):
            raise ValueError(f"channels {list(self.channels)}: t2 comes first, each channel once")
        return self


class PiradsConfig(PipelineConfig):
    """The configuration as far as reading, checking and preparing go."""

    data: PiradsDataSection = Field(PiradsDataSection(), description="Series, labels, grid.")
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Values of single stages, by dotted key."
    )
