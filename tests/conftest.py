"""What all tests share: a seed, 2-D and 3-D, and small networks whose rule does something."""

import os
from pathlib import Path

import pytest
import torch

from mednca_monai import MedNCA


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[2, 3], ids=["2-D", "3-D"])
def spatial_dims(request):
    return request.param


@pytest.fixture
def size(spatial_dims):
    """Spatial size of an image that neither the tiles nor the scale factors of the tests divide."""
    return {2: [13, 11], 3: [7, 11, 5]}[spatial_dims]


@pytest.fixture(params=["dense", "depthwise", "sublattices", "per axis", "three levels"])
def settings(request, spatial_dims):
    """Arguments of the networks that every law is tested on, beside 2-D and 3-D."""
    return {
        "dense": {"scale_factor": 4},
        "depthwise": {"perception": "depthwise", "kernel_size": (5, 3), "scale_factor": 2},
        "sublattices": {"firing": "sublattices", "scale_factor": 3, "hidden_size": 64},
        "per axis": {
            "scale_factor": (4, 3, 1)[:spatial_dims],
            "fire_rate": 0.7,
            "hidden_size": 64,
        },
        "three levels": {"num_levels": 3, "scale_factor": 2, "steps": (1, 2, 3)},
    }[request.param]


@pytest.fixture
def make_network():
    """Factory of small networks in float64, in ``eval()``, whose last layers are not zero."""

    def make(spatial_dims, in_channels=2, out_channels=2, **arguments):
        settings = {"num_channels": 6, "hidden_size": 8, "steps": (2, 3), "scale_factor": 2}
        network = MedNCA(spatial_dims, in_channels, out_channels, **{**settings, **arguments})
        for level in network.levels:
            torch.nn.init.normal_(level.update.weight, std=0.1)
        return network.double().eval()

    return make


@pytest.fixture(scope="session")
def shared():
    """Folder with the stored reference cases and the real data."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MEDNCA_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set MEDNCA_SHARED to the folder of the reference cases")
    return folder
