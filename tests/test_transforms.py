import math

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from mednca_monai.transforms import (
    CheckImaged,
    CheckLabeld,
    LoadImageNamingd,
    ResampleSpacingd,
    VolumeWriter,
)


def image(*shape, value=1.0, affine=None):
    tensor = torch.arange(math.prod(shape)).float().reshape(shape) % 2
    if tensor.numel():
        tensor.flatten()[-1] = value
    return MetaTensor(tensor, affine, meta={"filename_or_obj": "scans/patient_7.nii.gz"})


def test_a_good_image_passes_unchanged_and_other_keys_are_not_looked_at():
    data = {"image": image(2, 3, 4, 5), "label": image(1, 3, value=torch.nan), "name": "x"}
    checked = CheckImaged("image", spatial_dims=3, in_channels=2)(data)
    assert checked.keys() == data.keys()
    assert all(checked[key] is data[key] for key in data)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (image(1, 3, 4), "must have 2 channels, got 1"),
        (image(3, 3, 4), "must have 2 channels, got 3"),
        (image(2, 3, 4, 5), r"must have 2 spatial axes, got \[3, 4, 5\]"),
        (image(2, 3), r"must have 2 spatial axes, got \[3\]"),
        (image(2, 0, 4), r"must not be empty, got \[2, 0, 4\]"),
        (image(0, 3, 4), r"must not be empty, got \[0, 3, 4\]"),
        (image(2, 3, 4, value=torch.nan), "must be finite, got 1 NaN or infinite values"),
        (image(2, 3, 4, value=torch.inf), "must be finite, got 1 NaN or infinite values"),
        (image(2, 3, 4, value=-torch.inf), "must be finite, got 1 NaN or infinite values"),
        (
            image(2, 3, 4, affine=torch.zeros(3, 3)),
            r"must have an affine that can be inverted, got \[\[0.0, 0.0, 0.0\], .*\]",
        ),
        (
            image(2, 30, 20) * torch.tensor([1, 0])[:, None, None] + 7,
            r"must vary between its 0.5th and 99.5th percentile, got 7\.0 for both",
        ),
    ],
)
def test_an_image_that_a_network_cannot_segment_is_refused_with_its_files_name(wrong, message):
    check = CheckImaged(["image", "second"], spatial_dims=2, in_channels=2)
    for key in ("image", "second"):
        data = {"image": image(2, 3, 4), "second": image(2, 3, 4), key: wrong}
        with pytest.raises(ValueError, match=f"^`{key}` {message} in 'scans/patient_7.nii.gz'"):
            check(data)


def test_an_image_without_a_file_is_named_by_its_key():
    with pytest.raises(ValueError, match="got 1 in 'image'"):
        CheckImaged("image", spatial_dims=2, in_channels=2)({"image": torch.ones(1, 3, 4)})


def test_a_few_bright_cells_in_a_flat_image_do_not_make_it_vary():
    sparse = torch.zeros(1, 20, 20)
    sparse[0, 0, 0] = 1000
    with pytest.raises(ValueError, match=r"must vary between .* got 0\.0 for both in 'image'"):
        CheckImaged("image", spatial_dims=2, in_channels=1)({"image": sparse})


@pytest.mark.parametrize("broken", ["image", "label"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, broken):
    files = {key: tmp_path / f"{key}.nii.gz" for key in ("image", "label")}
    for path in files.values():
        nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.eye(4)), path)
    load = LoadImageNamingd(["image", "label"])
    assert load(files)["image"].shape == (2, 3, 4)
    files[broken].write_bytes(files[broken].read_bytes()[:70])
    with pytest.raises(ValueError, match=rf"^'[^']*{broken}.nii.gz' must be a readable image, got"):
        load(files)


@pytest.mark.parametrize("name", ["image.nii.gz", "IMAGE.NII.GZ"])
def test_a_compressed_file_with_a_wrong_bit_is_refused(tmp_path, name):
    path = tmp_path / name
    volume = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' must be a readable image, got: CRC"):
        LoadImageNamingd("image")({"image": path})


def test_integers_are_finite():
    data = {"image": image(1, 3, 4).as_tensor().to(torch.int16)}
    assert CheckImaged("image", spatial_dims=2, in_channels=1)(data) == data


@pytest.mark.parametrize(
    ("shape", "saved"),
    [
        ((1, 3, 4, 5), (3, 4, 5)),
        ((1, 3, 4, 1), (3, 4, 1)),
        ((1, 3, 1, 1), (3, 1, 1)),
        ((1, 1, 4, 5), (1, 4, 5)),
        ((2, 3, 4, 1), (3, 4, 1, 2)),
    ],
)
def test_a_volume_is_written_in_its_own_shape_and_place(tmp_path, shape, saved):
    volume, affine = torch.rand(shape), np.diag([1.0, -2.0, 3.0, 1.0])
    writer = SaveImage(
        tmp_path, "seg", ".nii.gz", writer=VolumeWriter, separate_folder=False, resample=False
    )
    writer(MetaTensor(volume, affine=affine, meta={"filename_or_obj": "scan.nii.gz"}))
    written = nibabel.load(tmp_path / "scan_seg.nii.gz")
    assert written.shape == saved
    np.testing.assert_array_equal(written.affine, affine)
    expected = volume.movedim(0, -1).reshape(saved).numpy()
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected)


def test_a_volume_is_not_written_over_its_image(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"the image")
    writer = SaveImage(
        tmp_path, "", ".nii.gz", writer=VolumeWriter, separate_folder=False, resample=False
    )
    with pytest.raises(RuntimeError, match=r"`output_postfix` must keep the image, got its file '"):
        writer(MetaTensor(torch.rand(1, 2, 3, 4), meta={"filename_or_obj": str(path)}))
    assert path.read_bytes() == b"the image"


def test_the_axis_of_one_channel_is_kept_where_it_is_asked_for():
    moved = VolumeWriter.convert_to_channel_last(torch.rand(1, 3, 4, 1), squeeze_end_dims=False)
    assert moved.shape == (3, 4, 1, 1)


def test_a_good_label_passes_unchanged():
    data = {"image": image(3, 4, 5), "label": image(1, 4, 5, value=2)}
    assert CheckLabeld("label", "image", out_channels=3)(data)["label"] is data["label"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (image(1, 4, 6), r"must have the image's size, \[1, 4, 5\], got \[1, 4, 6\]"),
        (image(2, 4, 5), r"must have the image's size, \[1, 4, 5\], got \[2, 4, 5\]"),
        (image(1, 4, 5, value=3), r"must hold integers from 0 to 2, got 3\.0"),
        (image(1, 4, 5, value=-1), r"must hold integers from 0 to 2, got -1\.0"),
        (image(1, 4, 5, value=0.5), r"must hold integers from 0 to 2, got 0\.5"),
        (image(1, 4, 5, value=torch.nan), r"must hold integers from 0 to 2, got nan"),
    ],
)
def test_a_label_that_does_not_fit_is_refused_with_its_files_name(wrong, message):
    data = {"image": image(3, 4, 5), "label": wrong}
    with pytest.raises(ValueError, match=f"^`label` {message} in 'scans/patient_7.nii.gz'"):
        CheckLabeld("label", "image", out_channels=3)(data)


def test_a_label_that_lies_elsewhere_than_its_image_is_refused():
    label = image(1, 4, 5)
    label.affine[0, 3] = 7
    with pytest.raises(ValueError, match=r"`label` must have the image's affine, got .* by 7 in"):
        CheckLabeld("label", "image", out_channels=3)({"image": image(3, 4, 5), "label": label})


def test_resampling_looks_at_its_keys_only():
    data = {"image": image(1, 5, 4, 3), "image_path": "scans/patient_7.nii.gz", "label": None}
    resampled = ResampleSpacingd("image", pixdim=[0.5, 1.0, 2.0], mode="bilinear")(data)
    assert list(resampled) == list(data)
    assert list(resampled["image"].shape) == [1, 9, 4, 2]
    assert {key: resampled[key] for key in ("image_path", "label")} == {
        "image_path": "scans/patient_7.nii.gz",
        "label": None,
    }


@pytest.mark.parametrize("pixdim", [[0.001, 1, 1], [1, 1, 200]])
def test_voxels_in_another_unit_are_refused_with_the_files_name(pixdim):
    data = {"image": image(1, 5, 4, 3)}
    with pytest.raises(ValueError, match=r"`image` must have voxels of a .* in 'scans.patient_7"):
        ResampleSpacingd("image", pixdim=pixdim)(data)


@pytest.mark.parametrize(
    "pixdim", [1.0, [1, 1], [1, 1, 0], [1, -1, 1], [1, 1, float("nan")], ["1", 1, 1]]
)
def test_voxels_of_no_size_are_refused(pixdim):
    with pytest.raises(ValueError, match="`pixdim` must be 3 numbers above 0, got"):
        ResampleSpacingd("image", pixdim=pixdim)
