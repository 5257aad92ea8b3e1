"""Dice of the shipped model when it runs fewer and more steps than it was trained with.

Each row is the bundle's own evaluation of the validation volumes, with other `steps`; the last
computes in bfloat16, with states of float32.

Run: python benchmarks/more_steps.py dataset_dir
"""

import csv
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

CONFIGS = Path(__file__).parents[1] / "bundle" / "configs"
STRUCTURES = ["whole", "anterior", "posterior"]
FACTORS = [0.5, 0.625, 0.75, 0.875, 1, 1.5, 2, 4]


def evaluate(
    dataset_dir: str, factor: float, **changes: Any
) -> tuple[list[int], dict[str, dict[str, str]]]:
    """Steps per level, and the bundle's summary by metric, with more changes of its configs."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        workflow = ConfigWorkflow(
            config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
            workflow_type="train",
            bundle_root=str(CONFIGS.parent),
            dataset_dir=dataset_dir,
            output_dir=folder,
            **changes,
        )
        steps = [round(n * factor) for n in workflow.parser["network_def"]["steps"]]
        workflow.parser["network_def"]["steps"] = steps
        workflow.initialize()
        workflow.run()
        with open(Path(folder) / "evaluation" / "summary.csv", newline="") as file:
            return steps, {row["metric"]: row for row in csv.DictReader(file)}


def show(dataset_dir: str, factor: float, note: str = "") -> None:
    """Print the row of a factor."""
    steps, summary = evaluate(dataset_dir, factor)
    means = [float(summary[f"dice_{name}"]["mean"]) for name in STRUCTURES]
    scores = [means[0], float(summary["dice_whole"]["min"]), *means[1:]]
    row = " | ".join(f"{score:.3f}" for score in scores)
    print(f"| {' + '.join(map(str, steps))}{note} | {factor:g} | {row} |", flush=True)


if __name__ == "__main__":
    print("| steps | times | whole | lowest | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- |")
    for factor in FACTORS:
        show(sys.argv[1], factor)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        show(sys.argv[1], 1, ", bfloat16")
