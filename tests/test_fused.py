"""Steps by a GPU's kernels, against PyTorch.

Without a GPU as Triton interprets them: `pip install triton`, then `TRITON_INTERPRET=1 pytest
tests/test_fused.py` (Triton 3.6 interprets with numpy before 2.4).
"""

import os
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from mednca_monai import MedNCA, automaton

ON_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

THE_BUNDLES = {"num_levels": 3, "scale_factor": 2, "num_channels": 10, "hidden_size": 64}
CASES = {
    "the paper's": (2, (9, 14), {"num_channels": 32, "hidden_size": 128}),
    "short axis": (2, (2, 9), {"num_levels": 1}),
    "single cell": (2, (4, 5), {"kernel_size": 1, "num_levels": 1}),
    "wide": (2, (7, 9), {"kernel_size": 5, "num_levels": 1, "fire_rate": 0.9}),
    "sublattices": (2, (9, 12), {"firing": "sublattices", "segment_steps": 1}),
    "the bundle's": (3, (7, 8, 9), THE_BUNDLES),
    "sublattices in 3-D": (3, (3, 4, 5), {"firing": "sublattices", "num_levels": 1}),
}


class Case(NamedTuple):
    """A network, images with two channels, their seeds and where their patches lie."""

    network: MedNCA
    image: torch.Tensor
    seed: torch.Tensor
    regions: list

    def results(self):
        """Logits of the patches and the gradients of image and weights."""
        image = self.image.clone().requires_grad_()
        logits = self.network(image, self.seed, self.regions)
        factors = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
        weights = list(self.network.parameters())
        return [logits, *torch.autograd.grad((logits.float() * factors).sum(), [image, *weights])]

    def to(self, *arguments):
        """On another device or in another dtype."""
        network, image = self.network.to(*arguments), self.image.to(*arguments)
        return Case(
            network, image, self.seed.to(network.levels[0].hidden.weight.device), self.regions
        )


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    spatial_dims, size, settings = request.param
    settings = {"num_channels": 6, "hidden_size": 20, "steps": 3, "segment_steps": 2, **settings}
    network = MedNCA(spatial_dims, 2, 2, **settings)
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    patch = [max(n - 3, 2) for n in size]
    last = torch.tensor(size) - torch.tensor(patch)
    regions = network.patch_regions(size, torch.stack([last, last // 2]), patch)
    return Case(network, torch.rand(2, 2, *size), torch.tensor([3, 2**40]), regions)


@pytest.mark.skipif(not INTERPRETS, reason="needs TRITON_INTERPRET=1")
def test_kernels_equal_pytorch(case, monkeypatch):
    expected = case.results()
    monkeypatch.setattr(automaton.CellularAutomaton, "fuses", lambda *_: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float32)
    assert_close(case.results(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = case.network(case.image, case.seed, case.regions)
    assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU or INTERPRETS, reason="needs a GPU: the interpreter always keeps it")
def test_kernels_keep_nan():
    network = MedNCA(2, 1, 1, num_channels=4, hidden_size=16, steps=1, num_levels=1).cuda()
    torch.nn.init.ones_(network.levels[0].hidden.bias)
    torch.nn.init.ones_(network.levels[0].update.weight)
    image = torch.zeros(1, 1, 8, 8, device="cuda")
    image[..., 3, 3] = torch.nan
    with torch.autocast("cuda", torch.bfloat16):
        assert network(image).isnan().any()


@pytest.mark.skipif(not ON_GPU or INTERPRETS, reason="needs a GPU")
@pytest.mark.parametrize("perception", ["dense", "depthwise"])
def test_a_gpu_gives_the_logits_of_the_cpu_in_float32(perception):
    network = MedNCA(3, 1, 2, **THE_BUNDLES, steps=8, perception=perception)
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.05)
    image = torch.rand(2, 1, 20, 18, 16)
    with torch.no_grad():
        expected = network.eval()(image)
        found = network.cuda()(image.cuda())
    assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU or INTERPRETS, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_are_as_near_to_float64_as_pytorch(case, dtype, monkeypatch):
    exact = [x.detach() for x in case.to(torch.float64).results()]
    case = case.to("cuda", torch.float32)

    def errors():
        with torch.autocast("cuda", dtype):
            found = case.results()
        pairs = zip(found, exact, strict=True)
        return [float((x.detach().cpu() - y).norm() / y.norm()) for x, y in pairs]

    with torch.autocast("cuda", dtype):
        assert all(level.fuses(case.image) for level in case.network.levels)
    by_kernels = errors()
    monkeypatch.setattr(automaton, "has_kernels", lambda _: False)
    for found, other in zip(by_kernels, errors(), strict=True):
        assert found <= max(2 * other, 0.03)
