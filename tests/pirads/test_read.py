"""Every format gives the same voxels at the same places, or one finding."""

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from tests.pirads.volumes import affine, real_data, texture, write_dicom, write_nifti

from diptych.errors import DataError
from diptych_pirads.geometry import Volume, reorient_lps
from diptych_pirads.read import open_volume, read_dicom_series, read_volume

TILTED = affine(tilt_degrees=15)
SMALL = (6, 20, 24)


def write_itk(path: Path, array: np.ndarray, lps: np.ndarray, **tags: str) -> Path:
    image = SimpleITK.GetImageFromArray(array)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    for key, value in tags.items():
        image.SetMetaData(key, value)
    SimpleITK.WriteImage(image, str(path))
    return path


def code_of(path: Path, series: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_volume(path, series)
    assert caught.value.findings is not None
    (finding,) = caught.value.findings
    assert finding.where == path.name
    return finding.code


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
def test_formats_agree_on_voxels_and_places(tmp_path: Path, suffix: str) -> None:
    array = texture(SMALL)
    path = tmp_path / f"t2{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(path, array, TILTED)
    else:
        write_itk(path, array, TILTED)
    v = read_volume(path)
    assert np.array_equal(v.array, array)
    assert np.allclose(v.affine, TILTED, atol=1e-4)


def test_nan_survives_reading(tmp_path: Path) -> None:
    array = texture(SMALL).astype(np.float32)
    array[2, 3, 4] = np.nan
    assert np.isnan(read_volume(write_nifti(tmp_path / "t2.nii", array)).array).sum() == 1


def test_a_stored_scale_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(texture(SMALL).transpose(2, 1, 0), np.diag([1.0, 1, 3, 1]))
    image.header.set_data_dtype(np.int16)
    data = image.get_fdata() * 0.01 + 3
    scaled = nib.Nifti1Image(data, image.affine)
    scaled.header.set_data_dtype(np.int16)
    nib.save(scaled, tmp_path / "t2.nii")
    read = read_volume(tmp_path / "t2.nii").array
    assert np.allclose(read, data.transpose(2, 1, 0), atol=1e-3)


def test_the_quaternion_counts_where_there_is_no_matrix(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "t2.nii", texture(SMALL), TILTED)
    image: Any = nib.load(path, mmap=False)
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    nib.save(image, path)
    assert np.allclose(read_volume(path).affine, TILTED, atol=1e-4)


def test_a_header_without_orientation_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t2.nii"
    image = nib.Nifti1Image(texture(SMALL).transpose(2, 1, 0), None)
    image.header.set_zooms((1, 1, 3))
    nib.save(image, path)
    assert [finding.code for finding in open_volume(path).findings] == ["W111"]


def test_big_endian_nrrd_is_read(tmp_path: Path) -> None:
    array = texture(SMALL).astype(">i2")
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {SMALL[2]} {SMALL[1]} {SMALL[0]}\nspace directions: (1,0,0) (0,1,0) (0,0,3)\n"
        "kinds: domain domain domain\nendian: big\nencoding: raw\nspace origin: (0,0,0)\n\n"
    )
    (tmp_path / "t2.nrrd").write_bytes(header.encode() + array.tobytes())
    assert np.array_equal(read_volume(tmp_path / "t2.nrrd").array, array)


def test_one_volume_in_four_dimensions_is_used_and_told(tmp_path: Path) -> None:
    opened = open_volume(write_nifti(tmp_path / "t2.nii", texture(SMALL)[None]))
    assert [finding.code for finding in opened.findings] == ["W113"]
    assert opened.volume.size == SMALL


def test_segment_names_are_read(tmp_path: Path) -> None:
    names = {"Segment0_LabelValue": "1", "Segment0_Name": "Peripheral zone"}
    path = write_itk(tmp_path / "zones.seg.nrrd", texture(SMALL), TILTED, **names)
    assert open_volume(path).segments == {1: "Peripheral zone"}


def test_a_patient_in_the_header_is_told_without_the_name(tmp_path: Path) -> None:
    path = write_itk(tmp_path / "t2.mha", texture(SMALL), TILTED, **{"0010|0010": "Test^Phantom"})
    (finding,) = open_volume(path).findings
    assert finding.code == "W119"
    assert "Phantom" not in finding.line()


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x1f\x8b\x08\x00broken"])
@pytest.mark.parametrize("name", ["t2.nii.gz", "t2.nii", "t2.nrrd", "t2.mha"])
def test_what_is_no_image_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert code_of(tmp_path / name) == "E101"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_cut_file_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t2{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(path, texture(SMALL), TILTED)
    else:
        write_itk(path, texture(SMALL), TILTED)
    path.write_bytes(path.read_bytes()[:-900])
    assert code_of(path) == "E101"


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".dcm"])
def test_damaged_headers_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    if suffix == ".dcm":
        v = Volume(texture((3, 8, 8)).astype(np.uint16), TILTED)
        path = write_dicom(tmp_path / "t2", v, uid="1.2.100")
        file = sorted(path.iterdir())[0]
    elif suffix == ".nii":
        file = path = write_nifti(tmp_path / "t2.nii", texture((3, 8, 8)))
    else:
        file = path = write_itk(tmp_path / f"t2{suffix}", texture((3, 8, 8)), TILTED)
    sound = file.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(sound)
        for at in draw.integers(0, min(len(sound), 1200 if suffix == ".dcm" else 350), 2):
            damaged[at] = draw.integers(0, 256)
        file.write_bytes(damaged)
        with suppress(DataError):  # any other exception fails the test
            assert read_volume(path).array.ndim == 3


def test_missing_and_unknown_files_are_told(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.nii.gz") == "E101"
    (tmp_path / "t2.png").write_bytes(b"png")
    assert code_of(tmp_path / "t2.png") == "E101"


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 0.01), (3.0, 2.5, 2.5), (12.0, 1.0, 1.0)])
def test_absurd_voxel_sizes_are_refused(
    tmp_path: Path, spacing: tuple[float, float, float]
) -> None:
    path = write_nifti(tmp_path / "t2.nii", texture(SMALL), affine(spacing=spacing))
    assert code_of(path) == "E107"


def test_sheared_axes_are_refused(tmp_path: Path) -> None:
    sheared = affine()
    sheared[0, 1] = 0.2
    assert code_of(write_nifti(tmp_path / "t2.nii", texture(SMALL), sheared)) == "E107"


def test_several_values_a_voxel_are_refused(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros((4, 8, 8, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "t2.nrrd"))
    assert code_of(tmp_path / "t2.nrrd") == "E113"


def test_dicom_slices_come_in_the_order_of_their_positions(tmp_path: Path) -> None:
    v = Volume(texture(SMALL).astype(np.uint16), TILTED)
    folder = write_dicom(tmp_path / "t2", v, uid="1.2.100")
    (folder / "notes.txt").write_text("no image")
    opened = open_volume(folder)
    assert np.array_equal(opened.volume.array, v.array)
    assert np.allclose(opened.volume.affine, v.affine, atol=1e-3)
    assert [finding.code for finding in opened.findings] == ["W119"]


def test_two_series_need_a_choice(tmp_path: Path) -> None:
    v = Volume(texture(SMALL).astype(np.uint16), TILTED)
    write_dicom(tmp_path / "study", v, uid="1.2.100", description="t2_tra")
    other = Volume(v.array[:4] + 1, TILTED)
    folder = write_dicom(tmp_path / "study", other, uid="1.2.200", description="t2_sag")
    assert code_of(folder) == "E116"
    assert code_of(folder, "t2*") == "E116"
    assert read_dicom_series(folder, "*SAG").size == (4, 20, 24)
    assert read_dicom_series(folder, "1.2.100").size == SMALL


def test_a_missing_slice_is_told(tmp_path: Path) -> None:
    v = Volume(texture(SMALL).astype(np.uint16), TILTED)
    folder = write_dicom(tmp_path / "t2", v, uid="1.2.100")
    next(iter(folder.glob("02-*"))).unlink()  # (3 * 7) % 6 is another one: slice 2 has 14 % 6
    assert code_of(folder) == "E115"


def test_two_images_at_one_position_are_no_volume(tmp_path: Path) -> None:
    v = Volume(texture(SMALL).astype(np.uint16), TILTED)
    folder = write_dicom(tmp_path / "dwi", v, uid="1.2.100")
    write_dicom(tmp_path / "again", v, uid="1.2.100")
    for path in (tmp_path / "again").iterdir():
        path.rename(folder / f"b-{path.name}")
    assert code_of(folder) == "E113"


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "t2").mkdir()
    assert code_of(tmp_path / "t2") == "E101"


@pytest.mark.data
def test_a_real_image_and_its_mask_agree_about_their_place() -> None:
    image = read_volume(real_data() / "prostatex_t2" / "ProstateX-0227_t2_tra.nrrd")
    mask = read_volume(real_data() / "picai" / "zonal_yuan23" / "10699_1000715.nii.gz")
    assert np.abs(reorient_lps(image).affine - reorient_lps(mask).affine).max() < 1e-3


@pytest.mark.data
def test_a_real_dicom_series_lies_where_another_reader_puts_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data() / "dicom_small" / "t2_tra.zip") as archive:
        archive.extractall(tmp_path)
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    other = SimpleITK.ReadImage(files)
    v = read_volume(tmp_path)
    assert np.array_equal(v.array, SimpleITK.GetArrayFromImage(other))
    for index in ((0, 0, 0), (7, 63, 5)):
        point = other.TransformIndexToPhysicalPoint(index[::-1])
        assert np.allclose(v.to_lps(np.array(index)), point, atol=1e-3)


def test_a_volume_of_a_four_dimensional_file_is_named_by_its_number(tmp_path: Path) -> None:
    both = np.stack([texture(SMALL, seed) for seed in (1, 2)])
    path = write_nifti(tmp_path / "prostate_00.nii.gz", both)
    for number in (0, 1):
        named = path.with_name(f"{path.name}#{number}")
        np.testing.assert_array_equal(read_volume(named).array, both[number])
    assert code_of(path) == "E113"
    assert code_of(path.with_name(f"{path.name}#2")) == "E113"
    assert code_of(path.with_name("other.nii.gz#0")) == "E101"
