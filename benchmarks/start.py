"""What a user waits for at the start: importing, building, the first call; each in a fresh process.

Run: python benchmarks/start.py
"""

import statistics
import subprocess
import sys

REPEATS = 5
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
FIRST = """
import time, torch
from mednca_monai import MedNCA
from monai.networks.nets import BasicUNet
image = torch.rand(1, 1, 64, 64)
start = time.perf_counter()
with torch.no_grad():
    network = {}.eval()
    network(image)
print(time.perf_counter() - start)
"""
CASES = {
    "import torch": IMPORT.format("torch"),
    "import monai.networks.nets": IMPORT.format("monai.networks.nets"),
    "import monai.networks.nets, mednca_monai": IMPORT.format("monai.networks.nets, mednca_monai"),
    "import mednca_monai": IMPORT.format("mednca_monai"),
    "build and first call, 64²: BasicUNet": FIRST.format("BasicUNet(2, 1, 1)"),
    "build and first call, 64²: MedNCA": FIRST.format(
        "MedNCA(2, 1, 1, num_channels=16, hidden_size=64, steps=16)"
    ),
}


def seconds(code: str) -> float:
    """What a program prints, in a fresh process."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


if __name__ == "__main__":
    found = {name: [] for name in CASES}
    for _ in range(REPEATS):
        for name, code in CASES.items():
            found[name].append(seconds(code))
    print("| what | seconds |\n| --- | --- |")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} |")
