"""M3D-NCA's rule on volumes: time and memory of inference and training, each in a fresh process.

The baseline is the plain network with PyTorch's depthwise `conv3d`; both have 16 channels, a hidden
layer of 64, batch norm and the steps that the M3D-NCA paper gives for these sizes. The large
volume is trained on patches of 80 x 80 x 24.

Run: python benchmarks/volumes.py
"""

import statistics
import time

import torch
from measure import alone, peak, resident
from plain import PlainMedNCA
from torch import nn

from mednca_monai import MedNCA, RandomPatchInferer

CASES = [  # size, patch in training, steps, scale factor, repeats
    ((64, 64, 52), (64, 64, 52), (10, 10), (2, 2, 2), 3),
    ((320, 320, 24), (80, 80, 24), (20, 40), (4, 4, 1), 1),
]
KERNELS = (7, 3)


def build(name: str, steps: tuple[int, int], scale: tuple[int, ...]) -> nn.Module:
    """The plain network or ours."""
    torch.manual_seed(0)
    if name == "plain":
        network: nn.Module = PlainMedNCA(3, 16, 64, steps, KERNELS, scale, True, in_order=True)
    else:
        network = MedNCA.m3d_nca(steps=steps, scale_factor=scale)
    for level in network.levels:
        nn.init.normal_(level.update.weight, std=0.01)
    return network


def case(
    name: str,
    trained: bool,
    size: tuple[int, ...],
    patch: tuple[int, ...],
    steps: tuple[int, int],
    scale: tuple[int, ...],
    repeats: int,
) -> tuple[float, float]:
    """Median seconds and MiB that the first call adds to the process."""
    network, image = build(name, steps, scale), torch.rand(1, 1, *size)
    seconds, before = [], resident()
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.set_grad_enabled(trained):
            if not trained or patch == size:
                logits = network(image)
            elif name == "plain":
                logits = network(image, [[0, 0, 0]], patch)
            else:
                logits = RandomPatchInferer(patch)(image, network)
        if trained:
            logits.square().mean().backward()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            more = peak() - before
    return statistics.median(seconds), more


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| volume | pass | network | seconds | times faster | MiB | part of plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size, *settings in CASES:
        for trained in (False, True):
            plain = alone(case, "plain", trained, size, *settings)
            for name in ("plain", "MedNCA"):
                found = plain if name == "plain" else alone(case, name, trained, size, *settings)
                volume = " x ".join(str(n) for n in size)
                row = f"| {volume} | {'training' if trained else 'inference'} | {name}"
                row += f" | {found[0]:.2f} | {plain[0] / found[0]:.1f}"
                print(f"{row} | {found[1]:.0f} | {found[1] / plain[1]:.2f} |", flush=True)
