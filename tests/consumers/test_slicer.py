"""The packaged bundle as 3D Slicer's bundle module runs it, without Slicer."""

import nibabel
import numpy as np
import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def test_overrides_without_initialization_segment_an_image(run, bundle, make_dataset, tmp_path):
    dataset = make_dataset("data", slice(0), slice(1))
    [image], [label] = ([*dataset.glob(f"{part}Tr/*")] for part in ("images", "labels"))
    python = environment(*REQUIRED)
    [file] = run(python, "run_slicer.py", bundle, image, tmp_path / "output")
    found, expected = nibabel.load(file), nibabel.load(image)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-6)
    one, other = (np.asarray(nibabel.load(path).dataobj) > 0 for path in (file, label))
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.8
