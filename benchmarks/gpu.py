"""Time and memory of inference and training on a GPU as ratios to the plain baseline.

The paper's setting: 32 channels, hidden layer 128, 64 + 64 steps. All networks of a table take
turns; medians of several turns. The memory is the peak beyond what lies on the GPU before. The
plain baseline is `plain.py`, with the released code's order of axes and with them in order; for
inference also the latter's step by `torch.compile`. Rows in bfloat16 are under `torch.autocast`.
MedNCA's training goes back by segments of two steps.

Run: python benchmarks/gpu.py
"""

import copy
from collections.abc import Callable

import torch
from measure import interleaved
from speed import infer, ours, train
from torch import nn

REPEATS = 3


def networks(compiled: bool) -> dict[str, nn.Module]:
    """Those of `speed.py` and, if asked for, the plain baseline with compiled steps."""
    result = ours(32, 128, 64)
    if compiled:
        network = result["plain, compiled"] = copy.deepcopy(result["plain, axes in order"])
        for level in network.levels:
            level.step = torch.compile(level.step, dynamic=False)
    for name in ("MedNCA", "MedNCA, sublattices"):
        for level in result[name].levels:
            level.segment_steps = 2
    return {name: network.cuda() for name, network in result.items()}


def finished(run: Callable[[], object]) -> Callable[[], object]:
    """A case that ends when the GPU has done it."""

    def call() -> None:
        run()
        torch.cuda.synchronize()

    return call


def memory(run: Callable[[], object]) -> float:
    """Peak MiB beyond what is there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def table(title: str, compiled: bool, make: Callable[[nn.Module], Callable[[], object]]) -> None:
    """Print milliseconds, how many times faster than the plain baseline, and MiB."""
    cases: dict[str, Callable[[], object]] = {}
    for name, network in networks(compiled).items():
        cases[name] = finished(make(network))
        cases[f"{name}, bfloat16"] = torch.autocast("cuda", torch.bfloat16)(cases[name])
    seconds = interleaved(cases, REPEATS)
    print(
        f"\n{title}\n\n| network | milliseconds | times faster | MiB |\n| --- | --- | --- | --- |"
    )
    for name, run in cases.items():
        row = f"{1000 * seconds[name]:.1f} | {seconds['plain'] / seconds[name]:.1f}"
        print(f"| {name} | {row} | {memory(run):.0f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    images = torch.rand(20, 1, 256, 256, device="cuda")
    table("Inference, 16 images of 256²", True, lambda x: infer(x, images[:16]))
    table("Training, 20 images of 256², patches of 64²", False, lambda x: train(x, images, 64))
