import tempfile

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientationd, SaveImage
from PIL import Image

from mednca_monai.pictures import COLOURS, SaveImageOverlayd, overlay_picture


def marked(shape, *places):
    """Label map of single voxels: 1 at the first place, 2 at the second, ..."""
    label = np.zeros(shape, np.uint8)
    for number, place in enumerate(places):
        label[place] = number + 1
    return label


def expected(height, width, *blocks):
    """Black picture with one square of 4 pixels in each class's colour."""
    picture = np.zeros((height, width, 3), np.uint8)
    for colour, (row, column) in zip(COLOURS, blocks, strict=False):
        picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = colour
    return picture


def ramp(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_last_axis_points_up_and_the_other_to_the_right(axis):
    label = np.moveaxis(marked((3, 40, 50), (1, 5, 48), (1, 30, 0)), 0, axis)
    picture = overlay_picture(np.zeros(label.shape), label, axis)
    np.testing.assert_array_equal(picture, expected(200, 160, (1, 5), (49, 30)))


def test_the_second_axis_of_a_two_dimensional_image_points_down():
    label = marked((40, 50), (5, 48))
    picture = overlay_picture(torch.zeros(40, 50), torch.tensor(label))
    np.testing.assert_array_equal(picture, expected(200, 160, (48, 5)))
    grey = overlay_picture(ramp((40, 50)), np.zeros((40, 50)))
    assert grey[0, 0, 0] < grey[-1, 0, 0] < grey[0, -1, 0] <= grey[-1, -1, 0]


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_volume_of_one_slice_is_shown_whatever_the_axis(thin):
    label = np.expand_dims(marked((40, 50), (5, 48)), thin)
    for axis in range(3):
        picture = overlay_picture(np.zeros(label.shape), label, axis)
        np.testing.assert_array_equal(picture, expected(200, 160, (1, 5)))


@pytest.mark.parametrize(
    ("foreground", "count", "shown"),
    [
        (range(10, 20), 5, [11, 13, 15, 17, 19]),
        ([3, 30, 31, 32, 33], 5, [3, 30, 31, 32, 33]),
        ([3, 30], 5, [3, 30]),
        (range(10, 20), 1, [15]),
    ],
)
def test_slices_are_spread_evenly_over_those_with_foreground(foreground, count, shown):
    label = np.zeros((40, 5, 50), int)
    for i in foreground:
        label[i, 2, i] = 1
    picture = overlay_picture(np.zeros(label.shape), label, count=count)
    slices = [expected(200, 20, (49 - i, 2)) for i in shown]
    np.testing.assert_array_equal(picture, np.concatenate(slices, 1))


def test_without_foreground_slices_are_spread_over_the_volume():
    image = np.tile(np.arange(10.0)[:, None, None], (1, 5, 50))
    shades = overlay_picture(image, np.zeros(image.shape))[0, :: 5 * 4, 0]
    np.testing.assert_array_equal(shades, (np.array([1, 3, 5, 7, 9]) * 255 / 9).astype(int))


def test_grey_runs_from_the_first_to_the_ninety_ninth_percentile():
    image = ramp((1, 21, 21))
    low, high = np.percentile(image, [1, 99])
    image[0, 0, 0], image[0, -1, -1] = -1e6, 1e6
    picture = overlay_picture(image, np.zeros(image.shape))
    grey = ((image[0].clip(low, high) - low) * 255 / (high - low)).astype(int)
    np.testing.assert_array_equal(picture[::10, ::10], np.rot90(grey)[..., None].repeat(3, 2))


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_has_one_shade(value):
    assert np.ptp(overlay_picture(np.full((2, 9, 9), value), np.zeros((2, 9, 9)))) == 0


def test_only_outlines_are_coloured():
    label = np.zeros((1, 50, 50), int)
    label[0, 10:20, 10:20] = 1
    label[0, 10:20, 20:30] = 2
    picture = overlay_picture(np.zeros(label.shape), label)
    one = expected(200, 200)
    for colour, top in ((COLOURS[0], 120), (COLOURS[1], 80)):
        one[top : top + 40, 40:80] = colour
        one[top + 2 : top + 38, 42:78] = 0
    np.testing.assert_array_equal(picture, one)


def test_the_outline_of_a_gap_begins_beside_it():
    label = np.ones((1, 201, 201))
    label[0, 100] = 0
    picture = overlay_picture(np.zeros((1, 201, 201)), label)
    row = (picture[100] == COLOURS[0]).all(-1)
    coloured = [*range(2), *range(98, 100), *range(101, 103), *range(199, 201)]
    assert np.flatnonzero(row).tolist() == coloured


def test_a_structure_that_fills_the_slice_is_outlined_at_its_border():
    picture = overlay_picture(np.zeros((1, 50, 50)), np.ones((1, 50, 50)))
    assert (picture[[0, 1, -2, -1]] == COLOURS[0]).all()
    assert (picture[:, [0, 1, -2, -1]] == COLOURS[0]).all()
    assert (picture[2:-2, 2:-2] == 0).all()


def test_a_class_has_its_colour_whichever_others_are_there():
    number = len(COLOURS)
    for value, colour in ((2, COLOURS[1]), (number, COLOURS[-1]), (number + 1, COLOURS[0])):
        label = marked((1, 50, 50), (0, 5, 5)) * np.uint8(value)
        picture = overlay_picture(np.zeros(label.shape), label)
        assert (picture[4 * 44, 4 * 5] == colour).all()


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((1, 50, 50), 3.0, (200, 200)),
        ((1, 50, 50), (9, 1, 2), (200, 100)),
        ((1, 50, 50), (0.1, 2, 1), (200, 400)),
        ((50, 40), (2, 1), (200, 500)),
        ((1, 35, 36), 1, (216, 210)),
        ((1, 300, 400), 1, (400, 300)),
    ],
)
def test_slices_are_enlarged_to_two_hundred_pixels_in_proportion(shape, spacing, size):
    assert overlay_picture(np.zeros(shape), np.zeros(shape), spacing=spacing).shape == (*size, 3)


@pytest.mark.parametrize(
    ("image", "label", "count", "message"),
    [
        ((4, 5, 6), (4, 5, 7), 5, r"shape, \(4, 5, 6\), got \(4, 5, 7\)"),
        ((1, 4, 5, 6), (1, 4, 5, 6), 5, r"`segmentation` must be 2-D or 3-D"),
        ((4, 5, 6), (4, 5, 6), 0, "`count` must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(image, label, count, message):
    with pytest.raises(ValueError, match=message):
        overlay_picture(np.zeros(image), np.zeros(label), count=count)


@pytest.fixture
def data():
    image = ramp((2, 6, 8, 9)) * np.array([1, -1]).reshape(2, 1, 1, 1)
    affine = torch.diag(torch.tensor([3.0, 1.0, 2.0, 1.0], dtype=torch.float64))
    meta = {"filename_or_obj": "somewhere/case_1.nii.gz", "affine": affine}
    label = marked((1, 6, 8, 9), (0, 2, 3, 4), (0, 4, 6, 2))
    return {
        "image": MetaTensor(image, meta=meta),
        "pred": MetaTensor(label, meta=meta),
    }


@pytest.mark.parametrize("separate_folder", [True, False])
def test_files_are_named_as_saved_images_are(separate_folder, data, tmp_path):
    arguments = {"output_postfix": "seen", "separate_folder": separate_folder}
    SaveImageOverlayd("pred", "image", tmp_path / "png", **arguments)(data)
    SaveImage(tmp_path / "nii", output_ext=".nii", print_log=False, **arguments)(data["pred"])
    (png,) = (tmp_path / "png").rglob("*.*")
    (nii,) = (tmp_path / "nii").rglob("*.*")
    assert png.relative_to(tmp_path / "png") == nii.relative_to(tmp_path / "nii").with_suffix(
        ".png"
    )


@pytest.mark.parametrize("axis", [0, 2])
def test_the_first_channel_is_shown_with_the_spacing_of_the_voxels(
    axis, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of another disk"))
    SaveImageOverlayd("pred", "image", tmp_path, separate_folder=False, axis=axis)(data)
    picture = overlay_picture(data["image"][0], data["pred"][0], axis, spacing=[3, 1, 2])
    np.testing.assert_array_equal(Image.open(tmp_path / "case_1_overlay.png"), picture)


def test_data_passes_unchanged(data, tmp_path):
    data = Orientationd(["image", "pred"], "SPL", labels=None)(data)
    before = {key: (value.clone(), value.affine.clone()) for key, value in data.items()}
    after = SaveImageOverlayd("pred", "image", tmp_path)(data)
    assert after is data
    for key, (value, affine) in before.items():
        assert torch.equal(after[key], value)
        assert torch.equal(after[key].affine, affine)
        assert len(after[key].applied_operations) == 1


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("axcodes", ["LPS", "SAR", "PIR"])
def test_a_volume_looks_the_same_in_any_orientation(axcodes, plain, data, tmp_path):
    SaveImageOverlayd("pred", "image", tmp_path / "one", separate_folder=False)(data)
    data = Orientationd(["image", "pred"], axcodes, labels=None)(data)
    if plain:
        data["pred"] = data["pred"].as_tensor()
    SaveImageOverlayd("pred", "image", tmp_path / "two", separate_folder=False)(data)
    one, two = (tmp_path / name / "case_1_overlay.png" for name in ("one", "two"))
    np.testing.assert_array_equal(Image.open(one), Image.open(two))


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (6, 8, 9)])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, MetaTensor])
def test_cases_without_a_file_name_are_counted(kind, shape, tmp_path):
    image = ramp((3, *shape))
    data = {"image": kind(image), "pred": kind(np.zeros((1, *shape), np.float32))}
    save = SaveImageOverlayd("pred", "image", tmp_path, separate_folder=False)
    save(save(data))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_overlay.png", "1_overlay.png"]
    picture = overlay_picture(image[0], np.zeros(shape))
    np.testing.assert_array_equal(Image.open(tmp_path / "1_overlay.png"), picture)


def test_a_failure_leaves_the_older_picture_alone(data, tmp_path, monkeypatch):
    def fail(self, path):
        with open(path, "w") as file:
            file.write("half")
        raise OSError("disk full")

    save = SaveImageOverlayd("pred", "image", tmp_path, separate_folder=False)
    save(data)
    before = (tmp_path / "case_1_overlay.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(data)
    assert [path.name for path in tmp_path.iterdir()] == ["case_1_overlay.png"]
    assert (tmp_path / "case_1_overlay.png").read_bytes() == before


def test_several_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`keys` must be one key, got \('pred', 'label'\)"):
        SaveImageOverlayd(["pred", "label"], "image", tmp_path)


def test_an_axis_that_volumes_lack_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`axis` must be 0, 1 or 2, got 7"):
        SaveImageOverlayd("pred", "image", tmp_path, axis=7)


def test_one_hot_segmentations_are_refused(data, tmp_path):
    data["pred"] = data["pred"].repeat(3, 1, 1, 1)
    with pytest.raises(ValueError, match="`pred` must be a label map of 1 channel, got 3"):
        SaveImageOverlayd("pred", "image", tmp_path)(data)
    assert list(tmp_path.iterdir()) == []
