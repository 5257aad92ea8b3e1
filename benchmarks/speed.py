"""Time of inference and training as ratios to the plain baseline, with MONAI's networks beside it.

All networks of a table take turns in one process; the medians of several turns are shown. The
plain baseline is `plain.py`, with the released code's order of axes and, for comparison, as fast
as PyTorch runs it when the axes stay in order. The rows in bfloat16 are under `torch.autocast`, on
processors that compute in it.

Run: python benchmarks/speed.py [threads]
"""

import sys
from collections.abc import Callable

import torch
from measure import interleaved
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from plain import PlainMedNCA
from torch import Tensor, nn

from mednca_monai import MedNCA, RandomPatchInferer

REPEATS = 3


def peers() -> dict[str, nn.Module]:
    """MONAI's networks for one-channel 2-D images."""
    unet = UNet(2, 1, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)
    levels, strides = 6, [1, 2, 2, 2, 2, 2]
    filters = [32, 64, 128, 256, 512, 512]
    dynamic = DynUNet(2, 1, 1, [3] * levels, strides, strides[1:], filters=filters)
    return {
        "UNet": unet,
        "BasicUNet": BasicUNet(2, 1, 1),
        "DynUNet": dynamic,
        "SegResNet": SegResNet(2, in_channels=1, out_channels=1),
    }


def ours(num_channels: int, hidden_size: int, steps: int) -> dict[str, nn.Module]:
    """Both firings and both plain baselines, with random last layers."""
    size = {"num_channels": num_channels, "hidden_size": hidden_size}
    networks = {
        "plain": PlainMedNCA(2, **size, steps=(steps, steps)),
        "plain, axes in order": PlainMedNCA(2, **size, steps=(steps, steps), in_order=True),
        "MedNCA": MedNCA(2, 1, 1, **size, steps=steps),
        "MedNCA, sublattices": MedNCA(2, 1, 1, **size, steps=steps, firing="sublattices"),
    }
    for network in networks.values():
        for level in network.levels:
            nn.init.normal_(level.update.weight, std=0.01)
    return networks


def infer(network: nn.Module, image: Tensor) -> Callable[[], object]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            network.eval()(image)

    return run


def train(network: nn.Module, image: Tensor, patch: int) -> Callable[[], object]:
    """A forward and a backward pass on random patches."""

    def run() -> None:
        network.train()
        if isinstance(network, PlainMedNCA):
            start = torch.randint(image.shape[-1] - patch + 1, (len(image), 2)).tolist()
            logits = network(image, start, (patch, patch))
        else:
            logits = RandomPatchInferer(patch)(image, network)
        logits.square().mean().backward()

    return run


def with_bfloat16(cases: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The cases and, where the processor knows bfloat16, all in it, too."""

    def autocast(run: Callable[[], object]) -> Callable[[], object]:
        return torch.autocast("cpu", torch.bfloat16)(run)

    half = {f"{name}, bfloat16": autocast(run) for name, run in cases.items()}
    return {**cases, **half} if torch.cpu._is_avx512_bf16_supported() else cases


def table(title: str, cases: dict[str, Callable[[], object]]) -> None:
    """Print seconds and how many times faster than the plain baseline."""
    print(f"\n{title}\n\n| network | seconds | times faster |\n| --- | --- | --- |")
    seconds = interleaved(cases, REPEATS)
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {seconds['plain'] / value:.2f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for num_channels, hidden_size, steps in ((16, 64, 16), (32, 128, 64)):
        networks = ours(num_channels, hidden_size, steps)
        title = f"{num_channels} channels, hidden layer {hidden_size}, {steps} + {steps} steps"
        for size in (64, 256):
            image = torch.rand(1, 1, size, size)
            cases = with_bfloat16({name: infer(x, image) for name, x in networks.items()})
            cases |= {name: infer(x, image) for name, x in peers().items()}
            table(f"Inference, one image of {size}², {title}", cases)
        batch, size, patch = (48, 64, 32) if steps == 16 else (2, 256, 64)
        image = torch.rand(batch, 1, size, size)
        cases = with_bfloat16({name: train(x, image, patch) for name, x in networks.items()})
        table(f"Training, {batch} images of {size}², patches of {patch}², {title}", cases)
