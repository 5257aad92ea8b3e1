"""Time and memory of the bundle's network on one image, by size; each size in a fresh process.

Run: python benchmarks/inference.py
"""

import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser

BUNDLE = Path(__file__).parents[1] / "bundle"
SIZES = [(64, 48), (256, 256), (512, 512), (1024, 1024)]
REPEATS = 5


def peak() -> float:
    """Peak resident memory of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(size: tuple[int, int]) -> tuple[float, float]:
    """Median seconds of a forward, and MiB that the first one adds to the process."""
    parser = ConfigParser(ConfigParser.load_config_file(str(BUNDLE / "configs" / "inference.json")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    seconds = []
    with torch.no_grad():
        network(torch.rand(1, 1, 16, 16))
        before, image = peak(), torch.rand(1, 1, *size)
        for _ in range(REPEATS):
            start = time.perf_counter()
            network(image)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak() - before


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| image | seconds | MiB |\n| --- | --- | --- |")
    for size in SIZES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(measure, (size,))
        print(f"| {size[0]} x {size[1]} | {seconds:.3f} | {memory:.0f} |", flush=True)
