"""Memory of inference and training as ratios to the plain baseline; each case in a fresh process.

Inference varies most between processes: the median of several is shown. The memory is the peak over
what the process holds before a forward pass, or a forward and a backward pass, once one of a small
image has loaded what the libraries need; the plain baseline takes 20 GB in the last setting.

Run: python benchmarks/memory_ratio.py
"""

import statistics

import torch
from measure import alone, peak, resident
from speed import infer, ours, train

REPEATS = 5  # of inference
INFERENCE = [(16, 64, 16, 1, 256), (32, 128, 64, 1, 256)]  # channels, hidden, steps, images, size
TRAINING = [(16, 64, 16, 48, 64, 32), (32, 128, 64, 2, 256, 64), (32, 128, 64, 20, 256, 64)]


def case(name: str, segment_steps: int, settings: tuple[int, ...]) -> float:
    """MiB that a call adds to the process; it is one of training if the last setting is a patch."""
    num_channels, hidden_size, steps, batch, size, *patch = settings
    torch.manual_seed(0)
    network = ours(num_channels, hidden_size, steps)[name]
    for level in network.levels:
        level.segment_steps = segment_steps
    small, image = torch.rand(1, 1, 64, 64), torch.rand(batch, 1, size, size)
    (train(network, small, 32) if patch else infer(network, small))()
    before = resident()
    (train(network, image, *patch) if patch else infer(network, image))()
    return peak() - before


def memory(name: str, segment_steps: int, settings: tuple[int, ...]) -> float:
    """Median MiB of fresh processes."""
    repeats = REPEATS if settings in INFERENCE else 1
    return statistics.median(alone(case, name, segment_steps, settings) for _ in range(repeats))


if __name__ == "__main__":
    print("| pass | setting | images | network | segment_steps | MiB | part of plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for settings in INFERENCE + TRAINING:
        num_channels, hidden_size, steps, batch, size, *patch = settings
        title = f"{num_channels} / {hidden_size}, {steps} + {steps}, {size}²"
        title = f"training | {title}, patch {patch[0]}²" if patch else f"inference | {title}"
        plain = memory("plain", 1, settings)
        print(f"| {title} | {batch} | plain |  | {plain:.0f} | 1 |", flush=True)
        if patch:
            networks = [("MedNCA", number) for number in (1, 2, 4)]
        else:
            networks = [("MedNCA", ""), ("MedNCA, sublattices", "")]
        for name, segment_steps in networks:
            more = memory(name, segment_steps, settings)
            row = f"| {title} | {batch} | {name} | {segment_steps} | {more:.0f}"
            print(f"{row} | 1/{plain / more:.1f} |", flush=True)
