"""The options of the verbs that this pipeline adds to the common ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from diptych.config import Section

OneFile = Literal["auto", "zones4", "pz_tz", "msd05", "prostate158", "gland", "prostatezones"]


class MeasureOptions(Section):
    """What is measured against what."""

    pred: Path = Field(description="Label file, or folder of label files.")
    ref: Path = Field(description="The same of the reference; files of a folder by equal names.")
    scheme: OneFile = Field(
        "auto", description="What the reference's values mean: zones4, pz_tz, prostate158, gland."
    )
    pred_scheme: OneFile = Field("auto", description="What those of --pred mean.")
    surface: Literal["erosion6", "contour26", "uats_voxel"] = Field(
        "erosion6", description="Surface of a zone."
    )
    average: Literal["pooled", "two_sided"] = Field("pooled", description="Mean of distances.")
    empty: Literal["nan", "zero"] = Field("nan", description="Distance to a zone that is missed.")
    regions: Literal["gland", "image"] = Field("gland", description="What thirds are of.")
    out: Path | None = Field(None, description="CSV for every figure, by third too.")


class LayoutOptions(Section):
    """Which layout it is, and where the manifest goes."""

    kind: Literal["picai", "msd05", "prostate158", "prostatex-meyer", "dicom"] = Field(
        description="picai, msd05, prostate158, prostatex-meyer, or dicom: folders of series."
    )
    out: Path = Field(Path("studies.csv"), description="The manifest, outside the data.")
    series: str = Field("*t2*tra*", description="dicom: pattern of the series' description.")
