"""A small made-up data set in the Medical Segmentation Decathlon layout, to try everything on."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mednca_monai.checks import check_int

Array = NDArray[np.float64]


def waves(rng: Generator, position: Array, wavelength: float) -> Array:
    """Smooth random field of mean 0 and variance 1, waves of about ``wavelength`` voxels."""
    frequency = rng.normal(size=(3, 8)) / wavelength
    phase = rng.uniform(0, 2 * np.pi, 8)
    field: Array = np.cos(2 * np.pi * position @ frequency + phase).sum(-1) / 2
    return field


def coverage(depth: Array) -> Array:
    """Share of a voxel that lies in a body, from its distance to the surface (negative inside)."""
    return 1 / (1 + np.exp(2.5 * np.clip(depth, -20, 20)))


def make_case(rng: Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8], Array]:
    """Draw one volume: image, label, both about ``(36, 48, 36)``, and affine, ``(4, 4)``.

    A bent tube along axis 1 becomes thicker where its anterior part begins. It lies in smooth
    texture, among balls that are as bright and as thick; a bias field and noise cover everything.
    """
    shape = np.array([36, 48, 36]) + rng.integers(-2, 3, 3)
    voxels = np.moveaxis(np.indices(shape.tolist()), 0, -1) - (shape - 1) / 2
    slope, bend = rng.uniform([-4, -7], [4, -2]), rng.uniform(1, 6, 2)
    half_length, split = rng.uniform(12, 14), rng.uniform(0, 0.25)
    t = np.linspace(-1, 1, 41)
    across = slope * t[:, None] + bend * (t[:, None] ** 2 - 0.5)
    line = np.stack([across[:, 0], half_length * t, across[:, 1]], -1) + rng.uniform(-2, 2, 3)
    radius = rng.uniform(3.5, 4.5) + rng.uniform(1.5, 2.5) * coverage((split - t) * 6)
    depths = np.linalg.norm(voxels[..., None, :] - line, axis=-1) - radius
    depth = depths.min(-1)
    label = np.where(depth < 0, np.where(t[depths.argmin(-1)] > split, 1, 2), 0)

    bodies = coverage(depth)
    for ball_radius in rng.uniform(2, 5, 12):
        centre = rng.choice(voxels[depth > ball_radius + 1.5])
        ball = coverage(np.linalg.norm(voxels - centre, axis=-1) - ball_radius)
        bodies = np.maximum(bodies, rng.uniform(0.8, 1.1) * ball)
    tissue = 0.4 + 0.08 * waves(rng, voxels, 12)
    image = tissue + (rng.uniform(0.8, 1.1) - tissue) * bodies
    image = image * np.exp(0.15 * waves(rng, voxels, 120)) + rng.normal(0, 0.08, shape)
    scale = np.exp(rng.uniform(np.log(100), np.log(5000)))
    affine = np.eye(4)
    affine[:3, 3] = rng.uniform(-60, 60, 3).round(1)
    return (image * scale).clip(0).round().astype(np.int16), label.astype(np.uint8), affine


def is_complete(folder: Path, properties: dict[str, Any]) -> bool:
    """Whether a folder holds the data set of these properties, with all its files."""
    try:
        found = json.loads((folder / "dataset.json").read_text())
    except (OSError, ValueError):
        return False
    files = [path for case in properties["training"] for path in case.values()]
    return bool(found == properties) and all((folder / path).is_file() for path in files)


def make_synthetic_dataset(
    dataset_dir: str | os.PathLike[str], num_cases: int = 20, seed: int = 0
) -> str:
    """Write a data set that takes seconds to make and minutes to learn, and that anyone may share.

    The task resembles the Decathlon's hippocampus: find a bent tube and part it in an anterior
    (label 1) and a posterior piece (label 2). Brightness alone does not tell, as there are other
    bodies. The folder appears once complete; one that already holds this data set is left as it is.
    A case depends on ``seed`` and its number only: a larger data set begins with the smaller one.

    Args:
        dataset_dir: folder to make.
        num_cases: number of volumes, at least 1; each about 36 x 48 x 36 voxels of 1 mm.
        seed: at least 0; the same seed gives the same voxels.

    Returns:
        ``dataset_dir``.

    Raises:
        ValueError: where ``dataset_dir`` exists and is not this data set (it stays untouched), or
            ``num_cases`` or ``seed`` is too small.
    """
    folder = Path(dataset_dir)
    cases = [f"synthetic_{i + 1:03d}.nii.gz" for i in range(check_int("num_cases", num_cases, 1))]
    properties = {
        "name": "Synthetic",
        "description": "Made-up bent tubes of an anterior and a posterior part",
        "reference": "mednca_monai.synthetic",
        "licence": "CC0-1.0",
        "release": "1.0",
        "seed": check_int("seed", seed, 0),
        "tensorImageSize": "3D",
        "modality": {"0": "synthetic"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": num_cases,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{c}", "label": f"./labelsTr/{c}"} for c in cases],
        "test": [],
    }
    if is_complete(folder, properties):
        return os.fspath(dataset_dir)
    if folder.exists():
        raise ValueError(
            f"`dataset_dir` must not exist or hold this data set (num_cases={num_cases}, "
            f"seed={seed}), got {os.fspath(dataset_dir)!r}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synthetic_", dir=folder.parent) as temporary:
        new = Path(temporary, "dataset")
        for name in ("imagesTr", "labelsTr"):
            (new / name).mkdir(parents=True)
        for number, case in enumerate(cases):
            image, label, affine = make_case(np.random.default_rng([seed, number]))
            for name, volume in (("imagesTr", image), ("labelsTr", label)):
                nifti = nib.Nifti1Image(volume, affine)  # type: ignore[no-untyped-call]
                nib.save(nifti, new / name / case)
        (new / "dataset.json").write_text(json.dumps(properties, indent=4) + "\n")
        try:
            os.replace(new, folder)
        except OSError:  # another process, of a run on several GPUs, may have been faster
            if not is_complete(folder, properties):
                raise
    return os.fspath(dataset_dir)
