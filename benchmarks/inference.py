"""Size, time and memory of the bundle's network and of UNets on volumes; each in a fresh process.

The networks have new weights and the inferers of their configs: tiles, or sliding windows.

Run: python benchmarks/inference.py
"""

import tempfile
from pathlib import Path

import torch
from measure import BUNDLE, FOLDER, OVERLAYS, alone, interleaved, peak, resident
from monai.bundle import ConfigParser

SIZES = [(36, 52, 36), (64, 64, 64), (128, 128, 128)]
REPEATS = 5


def measure(name: str, size: tuple[int, ...]) -> tuple[int, float, float, float]:
    """Parameters, kB on disk, median seconds of a volume, and MiB that the first one adds."""
    parser = ConfigParser()
    overlays = [str(FOLDER / overlay) for overlay in OVERLAYS[name]]
    parser.read_config([str(BUNDLE / "configs" / "train.json"), *overlays])
    parser["bundle_root"] = str(BUNDLE)
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
    for name in OVERLAYS:
        for size in SIZES:
            count, kilobytes, seconds, memory = alone(measure, name, size)
            volume = " x ".join(map(str, size))
            row = f"{name} | {count:,} | {kilobytes:,.0f} | {volume} | {seconds:.3f} | {memory:.0f}"
            print(f"| {row} |", flush=True)
