"""MONAI Label's inference and training tasks on the packaged bundle."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def as_studies(dataset):
    """Images with their labels in ``labels/final``, as MONAI Label keeps them."""
    folder = dataset.with_name(f"{dataset.name}_studies")
    shutil.copytree(dataset / "imagesTr", folder)
    shutil.copytree(dataset / "labelsTr", folder / "labels" / "final")
    return folder


def whole_dice(file, label):
    one, other = (np.asarray(nibabel.load(path).dataobj) > 0 for path in (file, label))
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_it_segments_and_trains_more_than_once(run, bundle, make_dataset):
    validation = make_dataset("validation", slice(0), slice(1))
    [image], [label] = ([*validation.glob(f"{part}Tr/*")] for part in ("images", "labels"))
    studies = [
        as_studies(make_dataset(n, s, slice(0))) for n, s in (("a", slice(8)), ("b", slice(8, 12)))
    ]
    optimizer = next(name for name in REQUIRED if name.startswith("pytorch-optimizer"))
    python = environment("monailabel==0.8.5", optimizer)
    result = run(python, "run_monai_label.py", bundle, studies[0], image, studies[1])
    scores = []
    for segmentation in (result["shipped"], result["after"]):
        found, expected = nibabel.load(segmentation["file"]), nibabel.load(image)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
        assert segmentation["names"] == {"anterior": 1, "posterior": 2}
        scores.append(whole_dice(segmentation["file"], label))
    assert scores[0] > 0.8
    assert 0.5 < scores[1] != scores[0]
    first, second = (Path(folder) for folder in result["trained"])
    assert first != second
    iterations = [
        torch.load(f / "last.pt", weights_only=True)["trainer"]["iteration"]
        for f in (first, second)
    ]
    assert iterations == [3, 5]
