"""What other programs import: every public name, with the parameters that it is called by."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import get_args

import pytest

import diptych_pirads

# Name -> its parameters in their order; those with "=" have that default. A name may take more
# parameters after these, all of which have defaults.
CALLED = {
    "LabelScheme": "name, allowed",
    "LabelScheme.to_sets": "self, arr",
    "Volume": "array, affine",
    "read_volume": "path",
    "read_dicom_series": "folder, series_uid=None",
    "reorient_lps": "v",
    "resample": "v, spacing, order, size=None",
    "crop_pad": "v, center_mm, size",
    "to_grid": "v, like, mode",
    "roi_from_three_series": "tra, sag, cor",
    "prepare_study": "row, cfg",
    "check_manifest": "path, strict=False",
    "AnisoUNet": "in_channels=1, out_channels=5, base=16, up_kernel='stride', norm='instance', "
    "dropout=0.5",
    "DualPathNet": "in_channels=1, paths={'a': (1, 2, 3), 'b': (1, 2, 4)}, base=16, share='none'",
    "fuse": "out_a, out_b, paths, mode='product'",
    "soft_dice": "p, g, eps=1e-05, batch=True, present_only=True",
    "meyer_loss": "p, g",
    "co_disagreement": "pa, pb, form='normalized'",
    "marginal_ce": "logp, allowed",
    "responsibility_dice": "p, allowed",
    "dual_loss": "out, target, cfg, stage, unlabelled=None",
    "PiradsTask.train_step": "self, batch, ctx",
    "dice": "a, b",
    "masd": "a, b, spacing, average='pooled', surface='erosion6', empty='nan'",
    "hd95": "a, b, spacing",
    "nsd": "a, b, spacing, tol=2.0",
    "evaluate_case": "pred, ref, scheme",
    "bootstrap": "values, subjects, n=2000, seed=0",
    "postprocess_zones": "prob_or_label, spacing, kind='diptych'",
    "assign_sector": "points_lps_mm, zones, version='2.1'",
    "lesion_sectors": "lesion, zones, min_fraction=0.05",
    "zone_volumes": "zones",
    "ellipsoid_volume": "gland",
    "psa_density": "psa, volume_ml",
    "make_phantom": "seed, index, shape, spacing",
    "write_dataset": "out, n, seed, schemes=('zones4', 'pz_tz', None)",
    "MeanShape.fit": "studies",
    "MeanShape.predict": "self, study",
    "BoxAtlas.fit": "studies",
    "BoxAtlas.predict": "self, study",
    "write_seg": "zones, source_folder, out",
    "ZonalSegmenter": "recipe='fast', seed=0",
    "ZonalSegmenter.fit": "self, manifest",
    "ZonalSegmenter.predict": "self, path",
    "ZonalSegmenter.save": "self, folder",
    "ZonalSegmenter.load": "folder",
}
FIELDS = {  # of plain data, by name
    "Volume": "array affine",
    "Roi": "lo hi center_lps",
    "Finding": "severity code where found fix",
    "PreparedStudy": "image present original center label",
    "DualOut": "a b sdf_a sdf_b presence_a presence_b",
    "Zones": "volume prob volumes disagreement",
}


@pytest.mark.parametrize("name", CALLED)
def test_every_public_name_is_called_as_promised(name: str) -> None:
    holder, *inner = name.split(".")
    called = getattr(diptych_pirads, holder)
    for part in inner:
        called = getattr(called, part)
    found = list(inspect.signature(called).parameters.values())
    promised = eval(f"lambda {CALLED[name]}: None")
    for own, wanted in zip(found, inspect.signature(promised).parameters.values(), strict=False):
        assert own.name == wanted.name
        if wanted.default is not wanted.empty:
            assert own.default == wanted.default
    wanted_count = len(inspect.signature(promised).parameters)
    assert len(found) >= wanted_count
    assert all(own.default is not own.empty for own in found[wanted_count:])


@pytest.mark.parametrize("name", FIELDS)
def test_plain_data_has_its_fields(name: str) -> None:
    plain = getattr(diptych_pirads, name)
    names = getattr(plain, "_fields", None) or [f.name for f in dataclasses.fields(plain)]
    assert set(FIELDS[name].split()) <= set(names)


def test_words_that_programs_compare_with_stay() -> None:
    assert diptych_pirads.ZONES == ("bg", "pz", "tz", "dpu", "afs")
    assert set(diptych_pirads.SCHEMES) >= {"zones4", "pz_tz", "msd05", "prostate158", "gland"}
    assert (len(diptych_pirads.SECTORS_V2), len(diptych_pirads.SECTORS_V21)) == (39, 41)
    from diptych_pirads.fusion import Fuse
    from diptych_pirads.metrics import Average, Empty, Surface
    from diptych_pirads.post import Kind

    assert set(get_args(Fuse)) == {"product", "mean", "a_then_b"}
    assert set(get_args(Surface)) == {"erosion6", "contour26", "uats_voxel"}
    assert (set(get_args(Average)), set(get_args(Empty))) == (
        {"pooled", "two_sided"},
        {"nan", "zero"},
    )
    assert set(get_args(Kind)) == {"diptych", "meyer", "none"}


def test_every_name_of_the_package_is_there() -> None:
    promised = {name.split(".")[0] for name in (*CALLED, *FIELDS)}
    assert promised <= set(diptych_pirads.__all__)
    for name in diptych_pirads.__all__:
        assert getattr(diptych_pirads, name) is not None


def test_the_pipeline_is_known_without_torch() -> None:
    code = (
        "import sys, diptych_pirads, diptych_pirads.pipeline as p; p.PIPELINE.config();"
        "assert not {'torch', 'scipy', 'matplotlib', 'SimpleITK'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
