"""Prostate zones on MRI: from series and partly labelled masks to zones beside honest baselines."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ZONES": "labels",
    "SCHEMES": "labels",
    "LabelScheme": "labels",
    "Volume": "geometry",
    "Roi": "geometry",
    "reorient_lps": "geometry",
    "resample": "geometry",
    "crop_pad": "geometry",
    "to_grid": "geometry",
    "roi_from_three_series": "geometry",
    "read_volume": "read",
    "read_dicom_series": "read",
    "check_manifest": "check",
    "Finding": "check",
    "PreparedStudy": "prepare",
    "prepare_study": "prepare",
    "AnisoUNet": "model",
    "DualPathNet": "model",
    "DualOut": "model",
    "fuse": "fusion",
    "soft_dice": "supervision",
    "meyer_loss": "supervision",
    "marginal_ce": "supervision",
    "responsibility_dice": "supervision",
    "co_disagreement": "objective",
    "dual_loss": "objective",
    "PiradsTask": "task",
    "segment": "infer",
    "dice": "metrics",
    "masd": "metrics",
    "hd95": "metrics",
    "nsd": "metrics",
    "evaluate_case": "metrics",
    "bootstrap": "metrics",
    "postprocess_zones": "post",
    "assign_sector": "sectors",
    "lesion_sectors": "sectors",
    "SECTORS_V2": "sectors",
    "SECTORS_V21": "sectors",
    "zone_volumes": "volumetry",
    "ellipsoid_volume": "volumetry",
    "psa_density": "volumetry",
    "make_phantom": "phantom",
    "write_dataset": "sample",
    "MeanShape": "baselines",
    "BoxAtlas": "baselines",
    "write_seg": "dicomseg",
    "Zones": "predict",
    "ZonalSegmenter": "estimator",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The public names, imported when first used, so that ``--help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diptych_pirads' has no attribute '{name}'")
    return getattr(importlib.import_module(f"diptych_pirads.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
