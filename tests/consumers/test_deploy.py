"""The Deploy App SDK's bundle operator on the packaged bundle, in an application of its own."""

import nibabel
import numpy as np
import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers

SDK = ("monai-deploy-app-sdk==4.0.0", "pydicom==3.0.2", "highdicom==0.28.2", "SimpleITK==2.5.7")


def test_an_application_segments_an_image(run, bundle, make_dataset, tmp_path):
    dataset = make_dataset("data", slice(0), slice(1))
    [image], [label] = ([*dataset.glob(f"{part}Tr/*")] for part in ("images", "labels"))
    python = environment(*REQUIRED, *SDK)
    run(python, "run_deploy.py", bundle, image, tmp_path / "found.nii.gz", timeout=400)
    found, expected = (
        np.asarray(nibabel.load(p).dataobj) for p in (tmp_path / "found.nii.gz", label)
    )
    assert found.shape == expected.shape
    assert set(np.unique(found)) == {0, 1, 2}
    one, other = found > 0, expected > 0
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.8
