"""Ways to segment an image with the shipped weights on one core: whole process, start to file.

The images are a volume and a made-up slice of 256 x 256 voxels. The size is that of the installed
packages that each way imports, its interpreter aside.

Run: python benchmarks/ways.py image.nii.gz
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from measure import BUNDLE

REPEATS = 3
SMALL = ["numpy", "numpy.libs", "nibabel"]
MONAI = [*SMALL, "torch", "monai", "ignite", "scipy", "scipy.libs", "PIL", "sympy", "networkx"]


def commands(image: str, folder: str) -> dict[str, tuple[list[str], list[str]]]:
    """Arguments of Python, and packages, by the name of the way."""
    script = [str(BUNDLE / "scripts" / "segment.py"), image, f"{folder}/segmentation.nii.gz"]
    bundle = ["-m", "monai.bundle", "run", "inference", "--bundle_root", str(BUNDLE)]
    bundle += ["--dataset_dir", image, "--output_dir", folder, "--config_file"]
    plain = [*bundle, str(BUNDLE / "configs" / "inference.json")]
    scripted = str([str(BUNDLE / "configs" / f"{n}.json") for n in ("inference", "inference_ts")])
    by_torchscript = [*bundle, scripted]
    by_onnx = [*script, "--weights", str(BUNDLE / "models" / "model.onnx")]
    return {
        "MONAI bundle": (plain, MONAI),
        "TorchScript, by the bundle": (by_torchscript, MONAI),
        "ONNX Runtime": (by_onnx, [*SMALL, "onnxruntime"]),
        "numpy": (script, SMALL),
    }


def installed(packages: list[str]) -> float:
    """MiB of the installed packages."""
    spec = importlib.util.find_spec("numpy")
    site = Path(spec.origin or "").parents[1] if spec else Path()
    files = [path for name in packages for path in (site / name).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / 2**20


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a process on one core."""
    start = time.perf_counter()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["taskset", "-c", "0", sys.executable, *arguments],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} ended with status {status}.")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    print("| image | way | seconds | MiB | MiB installed |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        flat = np.random.default_rng(0).random((256, 256, 1), np.float32)
        nibabel.save(nibabel.Nifti1Image(flat, np.eye(4)), f"{folder}/slice.nii.gz")
        for image, path in {"volume": sys.argv[1], "slice": f"{folder}/slice.nii.gz"}.items():
            for name, (arguments, packages) in commands(path, folder).items():
                runs = [measure(arguments) for _ in range(REPEATS)]
                seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
                size = installed(packages)
                row = f"| {image} | {name} | {seconds:.1f} | {memory:.0f} | {size:.0f} |"
                print(row, flush=True)
