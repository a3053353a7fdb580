"""Rigid registration: a diffusion series brought to the T2-weighted one by mutual information.

Patients move between series. A motion that is larger than patients make is a failure of the
registration, so that it is told and not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import SimpleITK
from jaxtyping import Float
from numpy import ndarray

from diptych_pirads.geometry import Volume, reorient_lps
from diptych_pirads.read import quiet_itk

LARGEST_MM = 5.0
LARGEST_DEGREES = 5.0
_BINS = 32
_SHRINK, _SMOOTH_MM = (2, 1), (2.0, 0.0)  # of the two resolutions
_STEPS = 100


@dataclass(frozen=True, eq=False)
class Motion:
    """A rigid motion.

    Args:
        matrix: (4, 4), takes a position in the fixed series to the same tissue's in the moving
            one, LPS mm.
        mm: How far it moves the middle of the gland's crop.
        degrees: How far it turns.
    """

    matrix: Float[ndarray, "4 4"]
    mm: float
    degrees: float

    @property
    def plausible(self) -> bool:
        """Whether patients move so little."""
        return self.mm <= LARGEST_MM and self.degrees <= LARGEST_DEGREES

    def undone(self, v: Volume) -> Volume:
        """The moving series where its tissue lies in the fixed one; nothing is interpolated."""
        return Volume(v.array, np.linalg.inv(self.matrix) @ v.affine)


def register(moving: Volume, fixed: Volume, center: Float[ndarray, " 3"]) -> Motion | None:
    """Find the rigid motion between two series of one examination.

    Mattes' mutual information of 32 bins over all voxels of `fixed`, maximised by gradient
    descent from where the headers put the series, at half and at full resolution; one thread, so
    that equal series give equal motions.

    Args:
        moving: (z, y, x), any contrast.
        fixed: (z, y, x), the crop of the T2-weighted series around the gland.
        center: (3,), about which it turns, LPS mm.

    Returns:
        The motion; None where the series do not overlap or nothing better was found.
    """
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, _STEPS, 0.5, 1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(_SHRINK)
    method.SetSmoothingSigmasPerLevel(_SMOOTH_MM)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    found = SimpleITK.Euler3DTransform()
    found.SetCenter([float(mm) for mm in center])
    method.SetInitialTransform(found, inPlace=True)
    images = _image(fixed), _image(moving)
    try:
        with quiet_itk(), _one_thread():
            before = method.MetricEvaluate(*images)
            method.Execute(*images)
            after = method.MetricEvaluate(*images)
    except RuntimeError:
        return None
    if not after < before:  # the negative of the information
        return None
    turn = np.reshape(found.GetMatrix(), (3, 3))
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = center + np.array(found.GetTranslation()) - turn @ center
    angle = math.acos(float(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    return Motion(matrix, float(np.linalg.norm(found.GetTranslation())), math.degrees(angle))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over threads come in any order; the method's own number of threads is not enough."""
    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _image(v: Volume) -> SimpleITK.Image:
    upright = reorient_lps(v)
    image = SimpleITK.GetImageFromArray(upright.array.astype(np.float32))
    image.SetSpacing([float(mm) for mm in upright.spacing[::-1]])
    image.SetOrigin([float(mm) for mm in upright.affine[:3, 3]])
    image.SetDirection([float(one) for one in upright.directions.ravel()])
    return image
