"""Memory of one training step against the plain baseline; each case in a fresh process.

The memory is the peak over what the process holds before the step; the plain baseline needs 20 GB
in the last setting.

Run: python benchmarks/training_memory.py
"""

import torch
from measure import alone, peak, resident
from speed import ours, train

CASES = [  # channels, hidden layer, steps, images, size, patch
    (16, 64, 16, 48, 64, 32),
    (32, 128, 64, 2, 256, 64),
    (32, 128, 64, 20, 256, 64),
]


def case(name: str, settings: tuple[int, ...], segment_steps: int) -> float:
    """MiB that a forward and a backward pass add to the process."""
    num_channels, hidden_size, steps, batch, size, patch = settings
    torch.manual_seed(0)
    network = ours(num_channels, hidden_size, steps)[name]
    for level in network.levels:
        level.segment_steps = segment_steps
    train(network, torch.rand(1, 1, 16, 16), 8)()
    image = torch.rand(batch, 1, size, size)
    before = resident()
    train(network, image, patch)()
    return peak() - before


if __name__ == "__main__":
    print("| setting | images | network | segment_steps | MiB | MiB per image |")
    print("| --- | --- | --- | --- | --- | --- |")
    for settings in CASES:
        num_channels, hidden_size, steps, batch, size, patch = settings
        title = f"{num_channels} / {hidden_size}, {steps} + {steps}, {size}², patch {patch}²"
        for name, segment_steps in (("plain", 1), ("MedNCA", 1), ("MedNCA", 4), ("MedNCA", 8)):
            more = alone(case, name, settings, segment_steps)
            row = f"| {title} | {batch} | {name} | {segment_steps} | {more:.0f}"
            print(f"{row} | {more / batch:.1f} |", flush=True)
