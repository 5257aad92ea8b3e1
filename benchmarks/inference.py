"""Time and memory of the bundle's network on a volume, by size; each size in a fresh process.

Run: python benchmarks/inference.py
"""

from pathlib import Path

import torch
from measure import alone, interleaved, peak, resident
from monai.bundle import ConfigParser

BUNDLE = Path(__file__).parents[1] / "bundle"
SIZES = [(36, 52, 36), (64, 64, 64), (128, 128, 128)]
REPEATS = 5


def measure(size: tuple[int, ...]) -> tuple[float, float]:
    """Median seconds of a forward, and MiB that the first one adds to the process."""
    parser = ConfigParser(ConfigParser.load_config_file(str(BUNDLE / "configs" / "inference.json")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        network(torch.rand(1, 1, 16, 16, 16))
        before, image = resident(), torch.rand(1, 1, *size)
        network(image)
        more = peak() - before
        return interleaved({"": lambda: network(image)}, REPEATS)[""], more


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| volume | seconds | MiB |\n| --- | --- | --- |")
    for size in SIZES:
        seconds, memory = alone(measure, size)
        print(f"| {' x '.join(map(str, size))} | {seconds:.3f} | {memory:.0f} |", flush=True)
