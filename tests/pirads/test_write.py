from pathlib import Path

import numpy as np
import pytest

from diptych_pirads.geometry import Volume
from diptych_pirads.phantom import make_phantom
from diptych_pirads.read import read_volume
from diptych_pirads.write import write_nifti


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_a_volume_reads_back_where_it_was(tmp_path: Path, name: str) -> None:
    volume = make_phantom(0, 0).reader2
    volume = Volume(volume.array[:, :50], volume.affine)
    write_nifti(volume, tmp_path / name)
    back = read_volume(tmp_path / name)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_channels_become_the_fourth_axis(tmp_path: Path) -> None:
    import nibabel

    channels = np.arange(5 * 2 * 3 * 4, dtype=np.float32).reshape(5, 2, 3, 4)
    write_nifti(Volume(channels, np.eye(4)), tmp_path / "prob.nii.gz")
    image = nibabel.load(tmp_path / "prob.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), channels.transpose(3, 2, 1, 0))


def test_another_ending_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a\.mha'"):
        write_nifti(Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.mha")
    assert not list(tmp_path.iterdir())
