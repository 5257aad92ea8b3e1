"""Exports of a bundle: TorchScript and ONNX give the network's logits at any size."""

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from mednca_monai.export import export

BUNDLE = Path(__file__).parents[1] / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle whose network takes two steps, so that its export takes seconds."""
    if torch.__version__ < "2.8":
        pytest.skip("before torch 2.8 its exporter to ONNX knows no free sizes")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(BUNDLE / "configs", folder / "configs")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    config["network_def"]["steps"] = 1
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    network = ConfigParser(config).get_parsed_content("network_def").eval()
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    (folder / "models").mkdir()
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their own parts
        export(str(folder))
    return folder / "models", network


def test_exports_lie_beside_the_weights(bundle):
    assert sorted(os.listdir(bundle[0])) == ["model.onnx", "model.pt", "model.ts"]


def test_exports_do_not_tell_where_they_were_made(bundle):
    here = str(BUNDLE.parent).encode()
    assert here not in (bundle[0] / "model.onnx").read_bytes()
    with zipfile.ZipFile(bundle[0] / "model.ts") as file:
        assert all(here not in file.read(name) for name in file.namelist())


@pytest.mark.parametrize("shape", [(1, 1, 9, 12, 10), (3, 1, 4, 1, 21)])
def test_exports_give_the_networks_logits(bundle, shape):
    onnxruntime = pytest.importorskip("onnxruntime")
    models, network = bundle
    image = torch.rand(shape)
    session = onnxruntime.InferenceSession(models / "model.onnx")
    (by_onnx,) = session.run(["pred"], {"image": image.numpy()})
    with torch.no_grad():
        expected, scripted = network(image), torch.jit.load(models / "model.ts")(image)
    torch.testing.assert_close(scripted, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(by_onnx), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_the_bundle_runs_from_the_torchscript_model(bundle, tmp_path):
    volume = np.random.default_rng(0).normal(size=(9, 12, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    root, found = bundle[0].parent, []
    for files in (["inference.json"], ["inference.json", "inference_ts.json"]):
        workflow = ConfigWorkflow(
            [str(root / "configs" / name) for name in files],
            workflow_type="infer",
            logging_file=False,
            bundle_root=str(root),
            output_dir=str(tmp_path / files[-1]),
            dataset_dir=str(tmp_path / "a.nii.gz"),
            device="cpu",
        )
        workflow.initialize()
        workflow.run()
        (path,) = (tmp_path / files[-1]).rglob("*.nii.gz")
        found.append(np.asarray(nibabel.load(path).dataobj))
    assert len(np.unique(found[0])) > 1
    np.testing.assert_array_equal(*found)


def test_the_shipped_models_are_small():
    sizes = {name: (BUNDLE / "models" / name).stat().st_size for name in ("model.ts", "model.onnx")}
    assert max(sizes.values()) < 420_000, sizes


def test_the_shipped_torchscript_model_gives_the_shipped_weights_logits():
    config = json.loads((BUNDLE / "configs" / "inference.json").read_text())
    network = ConfigParser(config).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    image = torch.rand(1, 1, 20, 17, 9)
    with torch.no_grad():
        expected = network(image)
        logits = torch.jit.load(BUNDLE / "models" / "model.ts").eval()(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
