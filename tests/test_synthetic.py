import json
import tempfile

import numpy as np
import pytest
from monai.data import load_decathlon_datalist, load_decathlon_properties
from monai.transforms import LoadImage

from mednca_monai import synthetic
from mednca_monai.synthetic import make_synthetic_dataset


def voxels(dataset_dir):
    paths = sorted(dataset_dir.glob("*Tr/*.nii.gz"))
    return {str(path.relative_to(dataset_dir)): LoadImage(dtype=None)(path) for path in paths}


def contents(path):
    files = [path, *path.rglob("*")]
    return {f: f.read_bytes() if f.is_file() else None for f in files}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    make_synthetic_dataset(folder, num_cases=3, seed=5)
    return folder


@pytest.fixture(scope="module")
def cases(dataset_dir):
    volumes = list(voxels(dataset_dir).values())
    return list(zip(volumes[:3], volumes[3:], strict=True))


def test_monai_reads_it_as_a_decathlon_data_set(dataset_dir):
    file = dataset_dir / "dataset.json"
    names = "name description reference licence tensorImageSize modality labels numTraining numTest"
    properties = load_decathlon_properties(file, names.split())
    assert properties["licence"] == "CC0-1.0"
    assert properties["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert properties["numTraining"] == 3
    listed = load_decathlon_datalist(file, True, "training")
    paths = {path for case in listed for path in case.values()}
    assert paths == {str(path) for path in dataset_dir.glob("*Tr/*.nii.gz")}
    assert len(paths) == 6


def test_volumes_are_small_and_of_one_millimetre_in_ras(cases):
    for image, label in cases:
        assert np.abs(np.subtract(image.shape, [36, 48, 36])).max() <= 2
        assert label.shape == image.shape
        assert (str(image.dtype), str(label.dtype)) == ("torch.int16", "torch.uint8")
        np.testing.assert_array_equal(image.affine[:3, :3], np.eye(3))
        np.testing.assert_array_equal(image.affine, label.affine)
        assert image.affine[:3, 3].abs().min() > 0
    assert len({image.shape for image, _ in cases}) > 1
    assert len({tuple(image.affine[:3, 3].tolist()) for image, _ in cases}) == 3


def test_the_anterior_part_lies_in_front_and_is_thicker(cases):
    for _, label in cases:
        label = label.numpy()
        anterior, posterior = (np.argwhere(label == c)[:, 1] for c in (1, 2))
        assert anterior.mean() - posterior.mean() > 10
        assert np.bincount(anterior).max() > 1.3 * np.bincount(posterior).max()
        assert min(len(anterior), len(posterior)) > 400
        assert not (np.pad(label[1:-1, 1:-1, 1:-1], 1) != label).any()


def test_the_structure_is_bright_but_brightness_alone_does_not_find_it(cases):
    for image, label in cases:
        image, foreground = image.numpy(), label.numpy() > 0
        assert np.median(image[foreground]) > 1.5 * np.median(image[~foreground])
        for threshold in np.percentile(image, np.linspace(50, 99, 50)):
            bright = image > threshold
            assert 2 * (bright & foreground).sum() < 0.8 * (bright.sum() + foreground.sum())


def test_scales_of_intensity_differ_and_fit_into_int16(cases):
    tops = [image.numpy().max() for image, _ in cases]
    assert max(tops) > 1.5 * min(tops)
    assert min(tops) > 50
    assert max(tops) < 32767
    assert min(image.min() for image, _ in cases) >= 0


def test_a_case_depends_on_the_seed_and_its_number_only(dataset_dir, tmp_path):
    expected = voxels(dataset_dir)
    make_synthetic_dataset(tmp_path / "same", num_cases=2, seed=5)
    same = voxels(tmp_path / "same")
    assert len(same) == 4
    for name, volume in same.items():
        np.testing.assert_array_equal(volume, expected[name])
        np.testing.assert_array_equal(volume.affine, expected[name].affine)
    make_synthetic_dataset(tmp_path / "other", num_cases=1, seed=6)
    for name, volume in voxels(tmp_path / "other").items():
        assert not np.array_equal(volume, expected[name])


def test_the_folder_is_an_ordinary_one_in_new_parents(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of another disk"))
    folder = tmp_path / "a" / "new" / "data"
    assert make_synthetic_dataset(folder, num_cases=1) == str(folder)
    assert folder.stat().st_mode == folder.parent.stat().st_mode
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_complete_data_set_is_not_made_again(dataset_dir, monkeypatch):
    monkeypatch.setattr(synthetic, "make_case", None)
    before = contents(dataset_dir)
    assert make_synthetic_dataset(str(dataset_dir), 3, 5) == str(dataset_dir)
    assert contents(dataset_dir) == before


def a_file(path):
    path.write_text("mine")


def an_empty_folder(path):
    path.mkdir()


def another_json(path):
    path.mkdir()
    (path / "dataset.json").write_text(json.dumps({"seed": 0}))


def a_broken_json(path):
    path.mkdir()
    (path / "dataset.json").write_text("{")


def another_seed(path):
    make_synthetic_dataset(path, num_cases=1, seed=1)


def another_number(path):
    make_synthetic_dataset(path, num_cases=2, seed=0)


def a_missing_label(path):
    make_synthetic_dataset(path, num_cases=1, seed=0)
    (path / "labelsTr" / "synthetic_001.nii.gz").unlink()


@pytest.mark.parametrize(
    "make_other",
    [
        a_file,
        an_empty_folder,
        another_json,
        a_broken_json,
        another_seed,
        another_number,
        a_missing_label,
    ],
)
def test_anything_else_is_refused_and_left_untouched(make_other, tmp_path):
    make_other(tmp_path / "data")
    before = contents(tmp_path)
    message = (
        r"`dataset_dir` must not exist or hold this data set \(num_cases=1, seed=0\), got '.*'"
    )
    with pytest.raises(ValueError, match=message):
        make_synthetic_dataset(tmp_path / "data", num_cases=1)
    assert contents(tmp_path) == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    made = []

    def fail_at_the_second(rng):
        if made:
            raise KeyboardInterrupt
        made.append(synthetic_case(rng))
        return made[0]

    synthetic_case = synthetic.make_case
    monkeypatch.setattr(synthetic, "make_case", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_dataset(tmp_path / "data", num_cases=2)
    assert len(made) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other_seed", [0, 1])
def test_of_two_processes_the_faster_wins(other_seed, tmp_path, monkeypatch):
    def be_slower(rng):
        monkeypatch.undo()
        make_synthetic_dataset(tmp_path / "data", num_cases=1, seed=other_seed)
        return synthetic.make_case(rng)

    monkeypatch.setattr(synthetic, "make_case", be_slower)
    if other_seed == 0:
        make_synthetic_dataset(tmp_path / "data", num_cases=1)
    else:
        with pytest.raises(OSError, match="data"):
            make_synthetic_dataset(tmp_path / "data", num_cases=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["seed"] == other_seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cases": 0}, "`num_cases` must be an integer of at least 1, got 0."),
        ({"num_cases": 1, "seed": -1}, "`seed` must be an integer of at least 0, got -1."),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_synthetic_dataset(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []
