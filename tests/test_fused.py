"""Steps by a GPU's kernels, against PyTorch.

Without a GPU as Triton interprets them: `pip install triton`, then `TRITON_INTERPRET=1 pytest
tests/test_fused.py` (Triton 3.6 interprets with numpy before 2.4).
"""

import os

import pytest
import torch
from torch.testing import assert_close

from mednca_monai import MedNCA, automaton

ON_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

CASES = {
    "2-D": (2, (9, 13), {}),
    "short axis": (2, (2, 9), {"num_levels": 1}),
    "wide": (2, (7, 9), {"kernel_size": 5, "num_levels": 1, "fire_rate": 0.9}),
    "sublattices": (2, (9, 12), {"firing": "sublattices"}),
    "3-D": (3, (5, 6, 7), {"fire_rate": 1.0, "scale_factor": 2}),
    "sublattices in 3-D": (3, (3, 4, 5), {"firing": "sublattices", "num_levels": 1}),
    "a state of each step": (2, (9, 13), {"segment_steps": 1}),
}


def results(network, image, seed):
    """Logits and the gradients of image and weights."""
    image = image.clone().requires_grad_()
    logits = network(image, seed)
    factors = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    weights = list(network.parameters())
    return [logits, *torch.autograd.grad((logits.float() * factors).sum(), [image, *weights])]


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A network, images, their seeds."""
    spatial_dims, size, settings = request.param
    settings = {"num_channels": 6, "hidden_size": 20, "steps": 3, **settings}
    network = MedNCA(spatial_dims, 1, 2, **settings)
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    return network, torch.rand(2, 1, *size), torch.tensor([3, 2**40])


@pytest.mark.skipif(not INTERPRETS, reason="needs TRITON_INTERPRET=1")
def test_kernels_equal_pytorch(case, monkeypatch):
    network, image, seed = case
    expected = results(network, image, seed)
    monkeypatch.setattr(automaton.CellularAutomaton, "fuses", lambda *_: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float32)
    assert_close(results(network, image, seed), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(network(image, seed), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU or INTERPRETS, reason="needs a GPU")
def test_a_gpu_gives_the_logits_of_the_cpu_in_float32(case):
    network, image, seed = case
    with torch.no_grad():
        expected = network.eval()(image, seed)
        found = network.cuda()(image.cuda(), seed.cuda())
    assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU or INTERPRETS, reason="needs a GPU")
def test_a_gpu_is_as_near_to_float64_by_kernels_as_without(case, monkeypatch):
    network, image, seed = case
    exact = results(network.double(), image.double(), seed)
    network, image, seed = network.float().cuda(), image.cuda(), seed.cuda()

    def errors():
        with torch.autocast("cuda", torch.bfloat16):
            found = results(network, image, seed)
        pairs = zip(found, exact, strict=True)
        return [float((x.detach().cpu() - y).norm() / y.detach().norm()) for x, y in pairs]

    by_kernels = errors()
    monkeypatch.setattr(automaton, "has_kernels", lambda _: False)
    assert max(by_kernels) <= max(2 * max(errors()), 0.03)
