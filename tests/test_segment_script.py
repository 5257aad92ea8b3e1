"""The script that needs numpy and nibabel alone gives the bundle's own segmentation."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mednca_monai import MedNCA
from mednca_monai.firing import independent_fires, row_digests, step_digests

BUNDLE = Path(__file__).parents[1] / "bundle"
SCRIPT = BUNDLE / "scripts" / "segment.py"
SETTINGS = {"num_channels": 6, "hidden_size": 16, "steps": [3, 4]}
SHIPPED = {"num_levels": 3, "scale_factor": 2, "num_channels": 10, "hidden_size": 64}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("segment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_network(std=0.1, **settings):
    torch.manual_seed(0)
    network = MedNCA(3, 1, 3, **settings).eval()
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=std)
    return network


def test_weights_are_read_without_torch(script, tmp_path):
    state = make_network(**SETTINGS).state_dict()
    torch.save(state, tmp_path / "model.pt")
    weights = script.read_weights(tmp_path / "model.pt", {**script.DEFAULTS, **SETTINGS})
    assert weights.keys() == state.keys()
    assert all(np.array_equal(weights[key], state[key]) for key in state)


def test_a_file_that_holds_more_than_tensors_is_refused(script, tmp_path):
    torch.save({"weights": torch.ones(2), "more": torch.nn.ReLU()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"must hold float tensors, got torch\.nn"):
        script.unpickle(tmp_path / "model.pt")


def test_the_same_cells_fire(script):
    shape = (5, 1, 9)
    for step in range(3):
        zeros = torch.zeros(1, 2, dtype=torch.int64)
        rows = row_digests(step_digests(zeros[:, 0], 1, 3), zeros[:, 0], 5)
        expected = independent_fires(rows[step], zeros, list(shape[1:]), 2**31)
        assert np.array_equal(script.fires(1, step, shape, 2**31), expected[0, 0].numpy())


@pytest.mark.parametrize("size", [(9, 12, 10), (1, 6, 5), (16, 3, 1)])
def test_its_logits_are_the_networks(script, size, tmp_path):
    network, image = make_network(**SETTINGS), torch.rand(1, 1, *size)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    settings = {**script.DEFAULTS, **SETTINGS, "out_channels": 3}
    weights = script.read_weights(tmp_path / "model.pt", settings)
    logits = script.segment(image[0].movedim(0, -1).numpy(), weights, settings)
    with torch.no_grad():
        expected = network(image)[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "turn",
    [
        np.eye(3),
        np.eye(3) * 1.0005,
        np.eye(3) * 1.001,
        [[0, 0.28, -1.92], [-0.5, 0, 0], [0, 0.96, 0.56]],
    ],
)
def test_its_segmentation_is_the_bundles(tmp_path, turn):
    torch.save(make_network(0.03, **SHIPPED, steps=1).state_dict(), tmp_path / "w.pt")
    volume = np.random.default_rng(0).normal(50, 10, (20, 26, 18)).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = turn
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "scan.nii.gz")
    files = [str(tmp_path / "scan.nii.gz"), str(tmp_path / "found.nii.gz")]
    more = ["--weights", str(tmp_path / "w.pt")]
    subprocess.run([sys.executable, str(SCRIPT), *files, *more], check=True)
    found = nibabel.load(files[1])

    parser = ConfigParser(json.loads((BUNDLE / "configs" / "inference.json").read_text()))
    settings = {"bundle_root": str(BUNDLE), "output_dir": str(tmp_path), "ckpt_path": more[1]}
    parser.update({**settings, "datalist": files[:1], "separate_folder": False})
    parser.get_parsed_content("evaluator").run()
    expected = nibabel.load(tmp_path / "segmentations" / "scan_seg.nii.gz")
    np.testing.assert_allclose(found.affine, expected.affine, rtol=0, atol=1e-6)
    labels, others = np.asarray(found.dataobj), np.asarray(expected.dataobj)
    assert labels.dtype == others.dtype == np.uint8
    assert len(np.unique(others)) > 1
    assert (labels != others).sum() <= 2  # where the two largest logits are as good as equal


def test_it_runs_the_shipped_onnx_model(script):
    pytest.importorskip("onnxruntime")
    image = np.random.default_rng(0).random((20, 26, 18, 1), np.float32)
    settings = script.read_settings()
    weights = script.read_weights(BUNDLE / "models" / "model.pt", settings)
    expected = script.segment(image, weights, settings)
    logits = script.segment_by_onnx(image, BUNDLE / "models" / "model.onnx")
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_that_leave_their_file_are_refused(script, tmp_path):
    torch.save({"weight": torch.ones(6)[::2]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must hold whole tensors"):
        script.unpickle(tmp_path / "model.pt")


def make_files(folder):
    """Files that cannot be segmented, and a volume that can, ``good.nii``."""
    volume, sheared = np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4)
    sheared[0, 1] = 0.3
    volumes = {
        "good.nii": (volume, np.eye(4)),
        "two channels.nii": (np.stack([volume] * 2, -1), np.eye(4)),
        "flat.nii": (volume[0], np.eye(4)),
        "nan.nii": (np.where(volume > 3, volume, np.nan), np.eye(4)),
        "sheared.nii": (volume, sheared),
        "metres.nii": (volume, np.diag([0.001, 0.001, 0.001, 1])),
        "whole.nii.gz": (volume, np.eye(4)),
        "zeros.nii": (volume * 0, np.eye(4)),
    }
    for name, (data, affine) in volumes.items():
        nibabel.save(nibabel.Nifti1Image(data, affine), folder / name)
    doubled = nibabel.Nifti1Image(volume, np.eye(4))
    doubled.header["pixdim"][1:4] = 2
    doubled.set_sform(np.eye(4), update_affine=False)
    nibabel.save(doubled, folder / "doubled.nii")
    network = make_network(**SHIPPED, steps=1)
    network.levels[0].update.weight.data[1] = np.nan
    torch.save(network.state_dict(), folder / "nan.pt")
    torch.save([torch.ones(2)], folder / "list.pt")
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:150])
    wrong = bytearray((folder / "whole.nii.gz").read_bytes())
    wrong[-6] ^= 1  # of the checksum
    (folder / "wrong.nii.gz").write_bytes(wrong)
    (folder / "text.nii.gz").write_text("no volume")
    torch.save(make_network(**SETTINGS).state_dict(), folder / "other.pt")
    (folder / "text.pt").write_text("no weights")
    (folder / "dir.nii").mkdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two channels.nii", "out.nii"], "two channels.nii' must be one volume, got shape"),
        (["flat.nii", "out.nii"], "flat.nii' must be one volume, got shape"),
        (["nan.nii", "out.nii"], "nan.nii' must be finite"),
        (["zeros.nii", "out.nii"], "zeros.nii' must vary between its 0.5th and 99.5th percentile"),
        (["sheared.nii", "out.nii"], "sheared.nii' must have an affine with orthogonal axes"),
        (["metres.nii", "out.nii"], "metres.nii' must have voxels of a hundredth to a hundred"),
        (["doubled.nii", "out.nii"], "doubled.nii' must have an affine of its voxel sizes"),
        (["good.nii", "out.nii", "--weights", "nan.pt"], "nan.pt' must give finite logits of '"),
        (
            ["good.nii", "out.nii", "--weights", "list.pt"],
            "list.pt' must hold weights of shapes",
        ),
        (["cut.nii.gz", "out.nii"], "cut.nii.gz' must be a NIfTI volume"),
        (["wrong.nii.gz", "out.nii"], "wrong.nii.gz' must be a NIfTI volume"),
        (["text.nii.gz", "out.nii"], "text.nii.gz' must be a NIfTI volume"),
        (["good.nii", "out.png"], "`segmentation` must end in .nii or .nii.gz"),
        (["good.nii", "none/out.nii"], "`segmentation` must be a file in a folder to write to"),
        (
            ["good.nii", "dir.nii"],
            "`segmentation` must be a file in a folder to write to, got 'dir.nii'",
        ),
        (["good.nii", "good.nii"], "`segmentation` must be another file than `image`"),
        (["good.nii", "out.nii", "--weights", "other.pt"], "other.pt' must hold weights of shape"),
        (
            ["good.nii", "out.nii", "--weights", "text.pt"],
            "text.pt' must be weights saved by torch",
        ),
    ],
)
def test_what_it_cannot_segment_is_named_and_nothing_written(tmp_path, arguments, message):
    make_files(tmp_path)
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    after = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before
