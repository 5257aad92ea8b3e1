"""Time and memory of the bundle's network on one image, by size; each size in a fresh process.

Run: python benchmarks/inference.py
"""

import multiprocessing
from pathlib import Path

import torch
from measure import interleaved, peak, resident
from monai.bundle import ConfigParser

BUNDLE = Path(__file__).parents[1] / "bundle"
SIZES = [(64, 48), (256, 256), (512, 512), (1024, 1024)]
REPEATS = 5


def measure(size: tuple[int, int]) -> tuple[float, float]:
    """Median seconds of a forward, and MiB that the first one adds to the process."""
    parser = ConfigParser(ConfigParser.load_config_file(str(BUNDLE / "configs" / "inference.json")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        network(torch.rand(1, 1, 16, 16))
        before, image = resident(), torch.rand(1, 1, *size)
        network(image)
        more = peak() - before
        return interleaved({"": lambda: network(image)}, REPEATS)[""], more


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| image | seconds | MiB |\n| --- | --- | --- |")
    for size in SIZES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(measure, (size,))
        print(f"| {size[0]} x {size[1]} | {seconds:.3f} | {memory:.0f} |", flush=True)
