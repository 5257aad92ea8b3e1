"""Memory and time of whole and tiled images by size; each case in a fresh process.

16 channels, hidden layer 64, 16 + 16 steps, one image channel, one logit, float32. The memory is
the peak over what the process holds before the call, without the logits; the median of several
processes, as it varies between them, and one process for larger images, which take minutes.

Run: python benchmarks/memory.py [picture.png]
"""

import sys
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from measure import alone, peak, resident

from mednca_monai import MedNCA, TiledInferer

mpl.use("Agg")
SIZES = [512, 1024, 2048, 4096, 8192, 16384]
LARGEST_WHOLE = 4096  # larger images are run in tiles only
REPEATS, LARGEST_REPEATED = 5, 4096
TILE = 512


def case(size: int, tiled: bool) -> tuple[float, float, float]:
    """Seconds, MiB beyond input and output, and MiB of the whole process."""
    torch.manual_seed(0)
    network = MedNCA(2, 1, 1, num_channels=16, hidden_size=64, steps=16).eval()
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.02)
    inferer = TiledInferer(TILE)
    with torch.no_grad():
        network(torch.rand(1, 1, 64, 64))
        image = torch.rand(1, 1, size, size)
        before, start = resident(), time.perf_counter()
        logits = inferer(image, network) if tiled else network(image)
        seconds = time.perf_counter() - start
    return seconds, peak() - before - logits.numel() * 4 / 2**20, peak()


def plot(found: dict[bool, dict[int, float]], path: str) -> None:
    """Save a picture of the memory by size."""
    figure, axis = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
    for tiled, memory in found.items():
        label = f"tiles of {TILE}²" if tiled else "whole"
        axis.loglog(list(memory), list(memory.values()), "o-", base=2, label=label)
    axis.set(xlabel="image width and height", ylabel="MiB beyond input and output")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, tiles of {TILE}²")
    print("| image | way | seconds | MiB more | from, to | runs | bytes per pixel | MiB in all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found: dict[bool, dict[int, float]] = {False: {}, True: {}}
    for size in SIZES:
        for tiled in found:
            if tiled or size <= LARGEST_WHOLE:
                repeats = REPEATS if size <= LARGEST_REPEATED else 1
                runs = np.array([alone(case, size, tiled) for _ in range(repeats)])
                seconds, more, whole = np.median(runs, 0)
                found[tiled][size] = more
                row = f"{size}² | {'tiled' if tiled else 'whole'} | {seconds:.2f} | {more:.0f}"
                spread = f"{runs[:, 1].min():.0f} to {runs[:, 1].max():.0f}" if repeats > 1 else ""
                row += f" | {spread} | {repeats}"
                print(f"| {row} | {more * 2**20 / size**2:.0f} | {whole:.0f} |", flush=True)
    plot(found, sys.argv[1] if len(sys.argv) > 1 else "memory.png")
