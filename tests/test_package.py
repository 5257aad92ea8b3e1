"""The packaged bundle: what it holds, and that it runs where this package is not installed."""

import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mednca_monai.package import NAME, package

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return Path(package(str(tmp_path_factory.mktemp("dist") / "new")))


def test_the_archive_is_named_after_task_and_version(archive):
    version = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())["version"]
    assert archive.name == f"{NAME}_v{version}.zip"
    assert sorted(os.listdir(archive.parent)) == [NAME, archive.name]


def test_folder_and_archive_hold_the_bundle_and_this_package(archive):
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        assert all(file.read(name) == (archive.parent / name).read_bytes() for name in names)
    folder = archive.parent / NAME
    found = sorted(str(p.relative_to(archive.parent)) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(names) == found
    assert {"configs", "docs", "models", "scripts", "mednca_monai", "LICENSE"} == set(
        os.listdir(folder)
    )
    assert all("__pycache__" not in name for name in names)
    for name in ("models/model.pt", "configs/train.json", "mednca_monai/network.py"):
        assert f"{NAME}/{name}" in names


def test_what_is_pickled_in_the_archive_is_tensors_only(archive):
    tensors = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    script = {"torch.jit._pickle build_intlist"}
    seen = []
    for path in (archive.parent / NAME / "models").iterdir():
        if path.suffix == ".onnx":
            continue  # a format without pickles
        with zipfile.ZipFile(path) as file:
            for name in (name for name in file.namelist() if "pkl" in name.lower()):
                codes = list(pickletools.genops(file.read(name)))
                assert {"STACK_GLOBAL", "INST"}.isdisjoint(code.name for code, *_ in codes)
                found = {argument for code, argument, _ in codes if code.name == "GLOBAL"}
                compiled = {name for name in found if name.startswith("__torch__.")}
                assert found - compiled <= tensors | script
                assert path.suffix == ".ts" or found == tensors
                seen.append(path.name)
    assert sorted(seen) == ["model.pt", "model.ts", "model.ts"]


def test_the_same_files_give_the_same_bytes(archive, tmp_path):
    before = archive.read_bytes()
    compiled = archive.parent / NAME / "mednca_monai" / "__pycache__" / "network.pyc"
    compiled.parent.mkdir()
    compiled.touch()
    assert Path(package(str(archive.parent))).read_bytes() == before
    assert Path(package(str(tmp_path))).read_bytes() == before


def test_a_training_within_the_packaged_bundle_is_not_lost(archive):
    best = archive.parent / NAME / "output" / "checkpoints" / "best.pt"
    best.parent.mkdir(parents=True)
    best.touch()
    with pytest.raises(ValueError, match=r"`output_dir` must hold .* 1 others, such as output/"):
        package(str(archive.parent))
    assert best.exists()
    shutil.rmtree(archive.parent / NAME / "output")


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`bundle_dir` must hold a bundle.*without LICENSE"):
        package(str(tmp_path / "dist"), str(tmp_path))
    assert not (tmp_path / "dist").exists()


def test_it_segments_where_the_package_is_not_installed(archive, tmp_path):
    volume = np.random.default_rng(0).gamma(2, 100, (9, 12, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "scan.nii.gz")
    hidden = tmp_path / "hidden"  # a finder that knows this package only from the bundle
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )
    root = archive.parent / NAME
    check = "import importlib.util as u; print(u.find_spec('mednca_monai'))"
    env = {**os.environ, "PYTHONPATH": str(hidden)}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None", done
    command = [sys.executable, "-m", "monai.bundle", "run", "inference"]
    command += ["--config_file", f"{root}/configs/inference.json", "--bundle_root", str(root)]
    command += ["--dataset_dir", str(tmp_path / "scan.nii.gz"), "--output_dir", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = nibabel.load(tmp_path / "o" / "segmentations" / "scan" / "scan_seg.nii.gz")
    assert result.shape == volume.shape


@pytest.mark.parametrize("version", ["../../evil", "", 7, None])
def test_a_version_that_is_no_file_name_is_refused(tmp_path, version):
    shutil.copytree(ROOT / "bundle", tmp_path / "bundle", ignore=shutil.ignore_patterns("output"))
    (tmp_path / "bundle" / "configs" / "metadata.json").write_text(json.dumps({"version": version}))
    with pytest.raises(ValueError, match=r"`version` of metadata.json must be numbers and dots"):
        package(str(tmp_path / "dist"), str(tmp_path / "bundle"))
    assert not (tmp_path / "dist").exists()
