"""The bundle, run as users run it: by MONAI's command, from a folder that is not the bundle."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.swa_utils import AveragedModel

from mednca_monai import MedNCA
from mednca_monai.data import case_name

ROOT = Path(__file__).parents[1]
BUNDLE_COMMAND = ["-m", "monai.bundle", "run"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CONFIG = json.loads((ROOT / "bundle" / "configs" / "train.json").read_text())
HANDLERS = [handler["_target_"] for handler in CONFIG["train"]["handlers"]]
LOGGING = f"train#handlers#{HANDLERS.index('StatsHandler')}#iteration_log"
STEPS, CHANNELS = 4, 8
FAST = {"network_def#steps": STEPS, "network_def#num_channels": CHANNELS}
NETWORK = {"num_levels": 3, "scale_factor": 2, "num_channels": CHANNELS, "hidden_size": 64}
FAST_TRAINING = {
    **FAST,
    "crop_size": [12, 16, 12],
    "roi_size": [8, 8, 8],
    "max_epochs": 12,
    "volumes_per_batch": 4,
    "val_interval": 1,
    "learning_rate": 0.02,
    "ema_momentum": 0.5,
}


def tilted(spacing, degrees=20):
    """Affine of an oblique volume."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = -10, 20, 5
    return affine


def make_volume(rng, shape=(10, 14, 12)):
    """A bright ball in noise, and its label map: front half 1, back half 2."""
    position = np.moveaxis(np.indices(shape), 0, -1) - rng.uniform(0.35, 0.65, 3) * shape
    ball = np.linalg.norm(position, axis=-1) < 4
    image = (100 * ball + rng.normal(50, 10, shape)).astype(np.float32)
    return image, np.where(ball, 1 + (position[..., 1] < 0), 0).astype(np.uint8)


def save(volume, affine, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def stored_as(axcodes, volume, affine):
    """The same volume with its axes in another order and direction, and its affine."""
    here = nibabel.io_orientation(affine)
    turn = ornt_transform(here, axcodes2ornt(axcodes))
    return apply_orientation(volume, turn), affine @ inv_ornt_aff(turn, volume.shape)


def write_description(folder, names, suffix=".nii.gz"):
    cases = [
        {"image": f"./imagesTr/{n}{suffix}", "label": f"./labelsTr/{n}{suffix}"} for n in names
    ]
    (folder / "dataset.json").write_text(json.dumps({"training": cases, "test": []}))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eleven small cases, some in other orientations, with names out of the shipped split."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    split = json.loads((ROOT / "bundle" / "configs" / "split.json").read_text())
    names = [*split["training"][:7], *split["validation"][:3], "unnamed"]
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        image, label = make_volume(rng)
        affine = tilted((1.0, 0.8, 1.5))
        for kind, volume in (("imagesTr", image), ("labelsTr", label)):
            volume, turned = stored_as(("RAS", "LPS", "SRA")[number % 3], volume, affine)
            save(volume, turned, folder / kind / f"{name}.nii.gz")
    write_description(folder, names)
    return SimpleNamespace(path=folder, names=sorted(names), split=split)


@pytest.fixture(scope="module")
def weights():
    """State of the small network, as no training leaves it: it tells its classes apart."""
    torch.manual_seed(1)
    network = MedNCA(3, 1, 3, **NETWORK, steps=STEPS)
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    return network.state_dict()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, weights):
    """A copy of the bundle with weights of the small network."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    shutil.copytree(ROOT / "bundle" / "configs", folder / "configs")
    (folder / "models").mkdir()
    torch.save(weights, folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def run(bundle, tmp_path_factory):
    """Function that runs the command and returns its exit code and what it printed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(configs, *run_id, module=BUNDLE_COMMAND, root=bundle, path=ROOT, **overrides):
        files = [f"{root}/configs/{name}.json" for name in configs.split()]
        overrides = {"config_file": files if len(files) > 1 else files[0], **overrides}
        command = [sys.executable, *module, *run_id]
        for key, value in {"bundle_root": root, **overrides}.items():
            command += [f"--{key}", str(value)]
        # the CPU gives the same numbers again, and has a device for each of two processes
        variables = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path)}
        done = subprocess.run(
            command,
            cwd=elsewhere,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert list(elsewhere.iterdir()) == []
        return done.returncode, done.stdout

    return run


@pytest.fixture(scope="module")
def succeed(run):
    """Function that runs the command, which must succeed, and returns what it printed."""

    def succeed(*arguments, **options):
        code, text = run(*arguments, **options)
        assert code == 0, text
        return text

    return succeed


def read_table(output):
    """Scores of each case."""
    with open(output / "evaluation" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["case"] for row in rows}) == len(rows)
    return {row.pop("case"): {key: float(value) for key, value in row.items()} for row in rows}


def read_states(output):
    """All checkpoints of a training."""
    files = sorted((output / "checkpoints").iterdir())
    return {file.name: torch.load(file, weights_only=True) for file in files}


def same(one, other):
    """Whether nested states are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def segmentation_of(path, output):
    """The segmentation of an image, which must lie in the image's own space."""
    name = case_name(path)
    folder = output / "segmentations" / name
    assert sorted(os.listdir(folder)) == [f"{name}_overlay.png", f"{name}_seg.nii.gz"]
    with Image.open(folder / f"{name}_overlay.png") as picture:
        assert picture.height >= 200
    image, segmentation = nibabel.load(path), nibabel.load(folder / f"{name}_seg.nii.gz")
    assert segmentation.shape == image.shape[:3]
    assert segmentation.get_data_dtype() == np.uint8
    np.testing.assert_allclose(segmentation.affine, image.affine, rtol=0, atol=1e-6)
    for form in ("qform", "sform"):
        placed = getattr(segmentation, f"get_{form}")()
        np.testing.assert_allclose(placed, image.affine, rtol=0, atol=1e-5)
    return segmentation


def voxels(image):
    return np.asarray(image.dataobj)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.fixture(scope="module")
def trained(succeed, bundle, dataset):
    """Output folder of a training, at its default place."""
    succeed("train", "training", dataset_dir=dataset.path, **FAST_TRAINING)
    return bundle / "output"


@pytest.fixture(scope="module")
def scores(succeed, trained, dataset):
    """Evaluation of all labelled cases."""
    settings = {"dataset_dir": dataset.path, "split_file": None}
    succeed("train evaluate", "evaluating", **settings, **FAST)
    return read_table(trained)


def test_a_first_run_makes_its_own_data(succeed, bundle, tmp_path):
    settings = {**FAST_TRAINING, "max_epochs": 1, "dataset_dir#num_cases": 5}
    succeed("train synthetic", "training", output_dir=tmp_path, **settings)
    assert (tmp_path / "data" / "dataset.json").is_file()
    assert list(read_states(tmp_path)) == ["best.pt", "last.pt"]


def test_training_keeps_the_best_and_the_last_state(trained):
    states = read_states(trained)
    assert list(states) == ["best.pt", "last.pt"]
    network = MedNCA(3, 1, 3, **NETWORK, steps=STEPS)
    network.load_state_dict(states["best.pt"])
    averaged = AveragedModel(network)
    averaged.load_state_dict(states["last.pt"]["ema"])
    assert averaged.n_averaged == 24
    assert states["last.pt"]["trainer"] == {"epoch": 12, "iteration": 24}
    assert states["last.pt"]["evaluator"]["best_metric"] > 0.2


def test_training_leaves_the_shipped_weights_alone(trained, bundle, weights):
    assert sorted(os.listdir(bundle)) == ["configs", "models", "output"]
    assert os.listdir(bundle / "models") == ["model.pt"]
    assert same(torch.load(bundle / "models" / "model.pt", weights_only=True), weights)


def test_training_logs_losses_metrics_and_pictures(trained):
    scalars, images = {}, {}
    for file in trained.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        images |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
    lengths = {tag: len(values) for tag, values in scalars.items()}
    names = ["train_dice", "val_dice", *(f"state_rms_{level}" for level in range(3))]
    once = dict.fromkeys(names, 12)
    assert lengths == {"train_loss": 24, **once}
    assert sorted(tag.partition("_HWD")[0] for tag in images) == ["input_0", "input_1", "output"]
    assert all(images.values())


def test_evaluation_scores_the_validation_part_with_the_best_state(
    succeed, trained, dataset, tmp_path
):
    checkpoint = trained / "checkpoints" / "best.pt"
    text = succeed(
        "train evaluate",
        "evaluating",
        dataset_dir=dataset.path,
        output_dir=tmp_path,
        ckpt_dir=checkpoint.parent,
        **FAST,
    )
    assert f"Restored all variables from {checkpoint}" in text
    table = read_table(tmp_path)
    assert list(table) == sorted(dataset.split["validation"][:3])
    parts = [row[f"dice_{part}"] for row in table.values() for part in ("anterior", "posterior")]
    best = read_states(trained)["last.pt"]["evaluator"]["best_metric"]
    assert np.mean(parts) == pytest.approx(best, abs=1e-6)
    with open(tmp_path / "evaluation" / "summary.csv", newline="") as file:
        summary = {row["metric"]: row for row in csv.DictReader(file)}
    assert list(summary) == [
        f"{measure}_{part}"
        for measure in ("dice", "hd95", "surface_dice")
        for part in ("anterior", "posterior", "whole")
    ]


def test_without_a_split_file_evaluation_scores_every_labelled_case(scores, dataset):
    assert list(scores) == dataset.names


def test_a_saved_segmentation_has_the_score_that_evaluation_gave_it(
    succeed, trained, dataset, scores
):
    text = succeed("inference", "inference", dataset_dir=dataset.path, **FAST)
    assert f"Restored all variables from {trained / 'checkpoints' / 'best.pt'}" in text
    for name in dataset.names:
        file = f"{name}.nii.gz"
        found = voxels(segmentation_of(dataset.path / "imagesTr" / file, trained))
        label = voxels(nibabel.load(dataset.path / "labelsTr" / file))
        for part, number in (("anterior", 1), ("posterior", 2)):
            score = scores[name][f"dice_{part}"]
            assert dice(found == number, label == number) == pytest.approx(score, abs=1e-6)
        whole = dice(found > 0, label > 0)
        assert whole == pytest.approx(scores[name]["dice_whole"], abs=1e-6)
        assert whole > 0.2


def test_images_of_any_shape_and_orientation_are_segmented_in_their_own_space(
    succeed, trained, tmp_path
):
    image, label = make_volume(np.random.default_rng(1))
    affine = tilted((1.0, 0.8, 2.5))
    volumes = {axcodes: stored_as(axcodes, image, affine) for axcodes in ("RAS", "LPS", "SPL")}
    volumes |= {
        "trailing": (image[..., None], affine),
        "integer": (image.round().astype(np.int16), affine),
        "one_axial": (image[:, :, 6:7], affine),
        "one_coronal": (image[:, 7:8], affine),
        "one_sagittal": (image[5:6], affine),
    }
    folder = tmp_path / "images"
    paths = {
        name: save(volume, place, folder / f"{name}.nii.gz")
        for name, (volume, place) in volumes.items()
    }
    succeed(
        "inference",
        "inference",
        dataset_dir=folder,
        output_dir=tmp_path,
        ckpt_path=trained / "checkpoints" / "best.pt",
        **FAST,
    )
    found = {name: segmentation_of(path, tmp_path) for name, path in paths.items()}
    assert dice(voxels(found["RAS"]) > 0, label > 0) > 0.2
    for name in ("LPS", "SPL", "trailing"):
        turned = nibabel.as_closest_canonical(found[name])
        np.testing.assert_array_equal(voxels(turned), voxels(found["RAS"]))
    for name in ("integer", "one_axial", "one_coronal", "one_sagittal"):
        assert voxels(found[name]).any(), name


def test_a_bundle_that_carries_the_package_needs_no_installation(
    succeed, bundle, dataset, tmp_path
):
    carried = tmp_path / "carried"
    for part in ("configs", "models"):
        shutil.copytree(bundle / part, carried / part)
    shutil.copytree(ROOT / "mednca_monai", carried / "mednca_monai")
    paths = [str(path) for path in sorted(dataset.path.glob("imagesTr/*"))[:2]]
    text = succeed("inference", root=carried, path="", datalist=paths, **FAST)
    assert f"Restored all variables from {carried / 'models' / 'model.pt'}" in text
    assert len(os.listdir(carried / "output" / "segmentations")) == 2
    for path in paths:
        assert len(np.unique(voxels(segmentation_of(path, carried / "output")))) == 3


def test_an_image_that_is_no_volume_is_refused_by_name(run, tmp_path):
    path = save(np.ones((8, 9), np.float32), np.eye(4), tmp_path / "flat.nii.gz")
    code, text = run("inference", "inference", dataset_dir=path, output_dir=tmp_path, **FAST)
    assert code != 0
    assert "`image` must have 3 spatial axes, got [8, 9] in" in text
    assert str(path) in text
    assert list(tmp_path.glob("segmentations/*/*")) == []


def test_a_users_own_data_need_no_more_than_their_description(succeed, tmp_path):
    rng, affine = np.random.default_rng(2), tilted((0.7, 1.0, 1.2))
    folder, names = tmp_path / "mine", [f"patient {letter}" for letter in "abcdefg"]
    for name in names:
        image, label = make_volume(rng)
        channels = np.stack([rng.normal(size=image.shape), -image], -1).astype(np.float32)
        save(channels, affine, folder / "imagesTr" / f"{name}.nii")
        save((label > 0).astype(np.uint8), affine, folder / "labelsTr" / f"{name}.nii")
    write_description(folder, names, ".nii")

    output = tmp_path / "output"
    settings = {"dataset_dir": folder, "output_dir": output, "in_channels": 2, "out_channels": 2}
    settings["label_names"] = ["background", "lesion"]
    succeed("train", "training", **settings, **FAST_TRAINING)
    succeed("train evaluate", "evaluating", **settings, **FAST)
    table = read_table(output)
    assert list(table) == ["patient a", "patient f"]
    assert list(table["patient a"]) == [
        f"{measure}_lesion" for measure in ("dice", "hd95", "surface_dice")
    ]
    assert table["patient a"]["dice_lesion"] > 0.2
    succeed("inference", "inference", **settings, **FAST)
    for name in names:
        found = voxels(segmentation_of(folder / "imagesTr" / f"{name}.nii", output))
        assert set(np.unique(found)) == {0, 1}


def test_a_training_that_was_killed_resumes_to_the_same_bits(
    run, succeed, trained, dataset, tmp_path
):
    settings = {"dataset_dir": dataset.path, "output_dir": tmp_path, **FAST_TRAINING}
    # in the middle of epoch 7, as a handler asks at each iteration whether to log it
    kill = "$lambda engine, iteration: iteration == 13 and os.kill(os.getpid(), 9)"
    code, text = run("train", "training", **settings, **{LOGGING: kill})
    assert code == -signal.SIGKILL, text
    assert read_states(tmp_path)["last.pt"]["trainer"]["epoch"] == 6

    text = succeed("train", "training", **settings)
    assert f"Resumed from '{tmp_path}/checkpoints/last.pt', after epoch 6." in text
    assert same(read_states(tmp_path), read_states(trained))


def test_a_loss_that_is_not_finite_ends_the_training_with_a_message(run, dataset, tmp_path):
    settings = {**FAST_TRAINING, "learning_rate": 1e30, "volumes_per_batch": 7}
    code, text = run("train", "training", dataset_dir=dataset.path, output_dir=tmp_path, **settings)
    assert code != 0
    assert "The loss is nan in epoch 3, iteration 3, at learning rate" in text
    last = read_states(tmp_path)["last.pt"]
    assert last["trainer"]["epoch"] == 2
    for state in (last["model"], last["ema"]):
        assert all(value.isfinite().all() for value in state.values())


def test_without_data_the_message_says_what_to_do(run, tmp_path):
    missing = tmp_path / "nothing"
    code, text = run("train", "training", dataset_dir=missing, output_dir=tmp_path, **FAST_TRAINING)
    assert code != 0
    assert "FileNotFoundError: Point `dataset_dir` to a folder that holds an MSD" in text
    assert f"'{missing}'" in text


def test_a_killed_process_ends_a_training_of_two_which_resumes(run, dataset, tmp_path):
    settings = {**FAST_TRAINING, "max_epochs": 2, "dataset_dir": dataset.path}

    def train(**more):
        module = TWO_PROCESSES + BUNDLE_COMMAND
        options = {"module": module, "output_dir": tmp_path, **settings, **more}
        return run("train multi_gpu_train", "training", **options)

    kill = "$lambda engine, iteration: iteration == 2 and os.kill(os.getpid(), 9)"
    code, text = train(**{LOGGING: kill})
    assert code > 0
    assert "Signal 9 (SIGKILL) received by PID" in text
    assert read_states(tmp_path)["last.pt"]["trainer"] == {"epoch": 1, "iteration": 1}

    code, text = train()
    assert code == 0, text
    assert f"Resumed from '{tmp_path}/checkpoints/last.pt', after epoch 1." in text
    states = read_states(tmp_path)
    assert states["last.pt"]["trainer"] == {"epoch": 2, "iteration": 2}
    network = MedNCA(3, 1, 3, **NETWORK, steps=STEPS)
    network.load_state_dict(states["best.pt"])


def test_two_processes_count_each_case_once(succeed, trained, dataset, scores, tmp_path):
    succeed(
        "train evaluate multi_gpu_evaluate",
        "evaluating",
        module=TWO_PROCESSES + BUNDLE_COMMAND,
        dataset_dir=dataset.path,
        output_dir=tmp_path,
        ckpt_path=trained / "checkpoints" / "best.pt",
        split_file=None,
        **FAST,
    )
    assert read_table(tmp_path) == scores
