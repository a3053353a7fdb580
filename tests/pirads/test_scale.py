"""The standard scale: learnt on the training part alone, used wherever a study is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.pirads.reading_network import CONFIG, Fitted, Reader, use_readers
from tests.pirads.studies import phantom_study, prepared_of
from tests.pirads.volumes import write_nifti

from diptych.config import merge
from diptych.contract import Fit
from diptych.split import Split
from diptych_pirads.config import PiradsConfig
from diptych_pirads.layout import locate
from diptych_pirads.phantom import make_phantom
from diptych_pirads.predict import open_segmenter, predict_study
from diptych_pirads.prepare import PreparedStudy
from diptych_pirads.scale import ARTIFACT, STANDARD, fit_scale, standardized
from diptych_pirads.task import build, modules

SIZE = (16, 64, 64)
NYUL = merge(
    PiradsConfig(),
    {"data.normalize.mode": "nyul", "model.base": 2, "data.geometry": {"size": list(SIZE)}},
)


def darkened(study: PreparedStudy, exponent: float = 1.8) -> PreparedStudy:
    """The same tissue on a scanner with another contrast curve."""
    return replace(study, image=study.image.with_array(study.image.array**exponent))


def deciles(study: PreparedStudy) -> np.ndarray:
    values = study.image.array[0]
    return np.percentile(values[(values > 0) & (values < 1)], range(10, 100, 10))


def test_another_contrast_of_a_scanner_is_undone() -> None:
    scale = fit_scale([phantom_study(k) for k in range(4)], ["t2"], SIZE)
    study = phantom_study(5)
    one, other = (standardized(each, scale, SIZE) for each in (study, darkened(study)))
    before = np.abs(study.image.array - darkened(study).image.array).mean()
    assert np.abs(one.image.array - other.image.array).mean() < 0.05 * before


def test_landmarks_become_the_mean_ones_and_the_ends_stay() -> None:
    training = [phantom_study(k) for k in range(3)]
    scale = fit_scale(training, ["t2"], SIZE)
    expected = np.mean([deciles(study) for study in training], axis=0)
    np.testing.assert_allclose(scale[STANDARD][0], [0, *expected, 1], atol=1e-6)
    study = darkened(phantom_study(7))
    mapped = standardized(study, scale, SIZE)
    np.testing.assert_allclose(deciles(mapped), expected, atol=2e-3)
    for end in (0, 1):
        np.testing.assert_array_equal(mapped.image.array == end, study.image.array == end)


def test_quantitative_and_missing_channels_stay_as_they_are() -> None:
    study = phantom_study(0)
    image = np.concatenate([study.image.array, study.image.array / 2, study.image.array * 0])
    three = replace(study, image=study.image.with_array(image))
    scale = fit_scale([three, darkened(three)], ["t2", "adc", "hbv"], SIZE)
    assert np.isfinite(scale[STANDARD]).all(axis=1).tolist() == [True, False, False]
    mapped = standardized(three, scale, SIZE).image.array
    np.testing.assert_array_equal(mapped[1:], image[1:])
    assert not np.array_equal(mapped[0], image[0])
    assert standardized(three, {}, SIZE) is three


@pytest.mark.parametrize("changed", [0, 2])
def test_a_fit_learns_its_scale_from_its_training_part_alone(changed: int) -> None:
    prepared = prepared_of(["zones4"] * 3)
    fit = Fit("final", Split((0,), (1,), (2,)), 0, stage="stage-2")
    built = modules(NYUL, prepared.facts, fit)
    scale = build(NYUL, prepared, fit, built, {}).artifacts()[ARTIFACT][STANDARD]
    prepared.ragged("image", changed)[:] = prepared.ragged("image", changed) ** 2
    again = build(NYUL, prepared, fit, built, {}).artifacts()[ARTIFACT][STANDARD]
    assert np.array_equal(scale, again) == (changed == 2)


def test_prediction_uses_the_scale_of_its_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_readers(monkeypatch)
    scale = fit_scale([phantom_study(k) for k in range(2)], ["t2"], SIZE)
    image = make_phantom(0, 9).image
    path = tmp_path / "dark.nii"
    write_nifti(path, (10000 * image.array**1.8 + 1).astype(np.int16), image.affine)
    (row,), _ = locate(path)
    found = {
        name: predict_study(open_segmenter(CONFIG, Fitted(Reader(), left)), row, "dark").study
        for name, left in (("with", {ARTIFACT: scale}), ("without", {}))
    }
    assert not np.array_equal(found["with"].image.array, found["without"].image.array)
    expected = standardized(found["without"], scale, SIZE)
    np.testing.assert_array_equal(found["with"].image.array, expected.image.array)
