"""Size, time and memory of the bundle's network and of UNets on volumes; each in a fresh process.

The networks have new weights and the inferers of their configs: tiles, or sliding windows.

Run: python benchmarks/inference.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import BUNDLE, FOLDER, OVERLAYS, alone, interleaved, peak, resident
from monai.bundle import ConfigParser

SIZES = [(36, 52, 36), (64, 64, 64), (128, 128, 128)]
REPEATS = 5


def measure(
    overlays: list[str], changes: dict[str, Any], size: tuple[int, ...]
) -> tuple[int, float, float, float]:
    """Parameters, kB on disk, median seconds of a volume, and MiB that the first one adds."""
    parser = ConfigParser()
    files = [BUNDLE / "configs" / "train.json", *(FOLDER / overlay for overlay in overlays)]
    parser.read_config([str(file) for file in files])
    parser.update({"bundle_root": str(BUNDLE)} | changes)
    network = parser.get_parsed_content("network_def").eval()
    inferer = parser.get_parsed_content("validate#inferer")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(network.state_dict(), path)
        kilobytes = path.stat().st_size / 1000
    count = sum(weight.numel() for weight in network.parameters())
    with torch.no_grad():
        network(torch.rand(1, 1, 32, 32, 32))
        before, image = resident(), torch.rand(1, 1, *size)
        inferer(image, network)
        more = peak() - before
        seconds = interleaved({"": lambda: inferer(image, network)}, REPEATS)[""]
    return count, kilobytes, seconds, more


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| network | parameters | kB | volume | seconds | MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, overlays in OVERLAYS.items():
        for size in SIZES:
            count, kilobytes, seconds, memory = alone(measure, overlays, {}, size)
            volume = " x ".join(map(str, size))
            row = f"{name} | {count:,} | {kilobytes:,.0f} | {volume} | {seconds:.3f} | {memory:.0f}"
            print(f"| {row} |", flush=True)
