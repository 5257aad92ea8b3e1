"""What the tests of programs that consume the bundle share: environments, the bundle, real data.

Each runs a script in an environment that has the consumer and not this package, which the packaged
bundle carries. Environments are made on first use and kept in ``MEDNCA_ENVIRONMENTS``, by default
``~/.cache/mednca_monai``.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mednca_monai.package import NAME, package

ROOT = Path(__file__).parents[2]
METADATA = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())
# what the bundle says that it needs, beside torch
REQUIRED = [f"{name}=={METADATA[f'{name}_version']}" for name in ("monai", "numpy")]
REQUIRED += [f"{k}=={v}" for k, v in METADATA["required_packages_version"].items()]

collect_ignore_glob = ["run_*.py"]  # they import what only the consumers' environments have


def environment(*requirements):
    """Python of an environment with these packages, made if needed."""
    key = "\n".join([sys.version, (ROOT / "constraints.txt").read_text(), *requirements])
    default = Path.home() / ".cache" / "mednca_monai"
    folder = Path(os.environ.get("MEDNCA_ENVIRONMENTS", default))
    folder /= hashlib.sha256(key.encode()).hexdigest()[:12]
    python = folder / "bin" / "python"
    if not (folder / "finished").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--quiet", "--constraint"]
        subprocess.run([*install, ROOT / "constraints.txt", *requirements], check=True)
        (folder / "finished").touch()
    return python


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    """Zip file of the packaged bundle, beside its folder."""
    return Path(package(str(tmp_path_factory.mktemp("dist"))))


@pytest.fixture
def bundle(packaged, tmp_path):
    """Folder of the packaged bundle, for one test."""
    return shutil.copytree(packaged.parent / NAME, tmp_path / NAME)


@pytest.fixture
def make_dataset(shared, tmp_path):
    """Function that makes an MSD folder of some of the real volumes of the shipped split."""
    split = json.loads((ROOT / "bundle" / "configs" / "split.json").read_text())
    source = shared / "data" / "Task04_Hippocampus"
    if not source.is_dir():
        pytest.skip(f"no {source}")

    def make(name, training, validation):
        names = [*split["training"][training], *split["validation"][validation]]
        cases = [{part: f"{part}sTr/{n}.nii.gz" for part in ("image", "label")} for n in names]
        folder = tmp_path / name
        for file in (file for case in cases for file in case.values()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)
        (folder / "dataset.json").write_text(json.dumps({"training": cases, "test": []}))
        return folder

    return make


@pytest.fixture
def run(tmp_path):
    """Function that runs a script of this folder and returns the last line it printed, parsed."""

    def run(python, script, *arguments, timeout=1800, **variables):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, Path(__file__).parent / script, *map(str, arguments)],
            cwd=tmp_path,
            env={**env, "CUDA_VISIBLE_DEVICES": "", **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
