"""Dice of the shipped model when it runs fewer and more steps than it was trained with.

Each row is the bundle's own evaluation of the validation volumes, with other `steps`.

Run: python benchmarks/more_steps.py dataset_dir
"""

import csv
import logging
import sys
import tempfile
from pathlib import Path

from monai.bundle import ConfigWorkflow

CONFIGS = Path(__file__).parents[1] / "bundle" / "configs"
FACTORS = [0.5, 0.625, 0.75, 0.875, 1, 1.5, 2, 4]


def evaluate(dataset_dir: str, factor: float) -> tuple[list[int], dict[str, dict[str, str]]]:
    """Steps per level, and the bundle's summary by metric."""
    with tempfile.TemporaryDirectory() as folder:
        workflow = ConfigWorkflow(
            config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
            workflow_type="train",
            bundle_root=str(CONFIGS.parent),
            dataset_dir=dataset_dir,
            output_dir=folder,
        )
        steps = [round(workflow.parser["network_def"]["steps"] * factor)] * 2
        workflow.parser["network_def"]["steps"] = steps
        workflow.initialize()
        workflow.run()
        with open(Path(folder) / "evaluation" / "summary.csv", newline="") as file:
            return steps, {row["metric"]: row for row in csv.DictReader(file)}


if __name__ == "__main__":
    print("| steps | times | whole | lowest | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- |")
    logging.disable(logging.WARNING)
    for factor in FACTORS:
        steps, summary = evaluate(sys.argv[1], factor)
        whole, anterior, posterior = (
            summary[f"dice_{name}"] for name in ("whole", "anterior", "posterior")
        )
        print(
            f"| {steps[0]} + {steps[1]} | {factor:g} | {float(whole['mean']):.3f} | "
            f"{float(whole['min']):.3f} | {float(anterior['mean']):.3f} | "
            f"{float(posterior['mean']):.3f} |",
            flush=True,
        )
