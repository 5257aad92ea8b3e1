"""Trainings of one kind, such as ten seeds or five folds, and a table of what came out.

Two run at a time on one thread each, by `training.py`; their scores are those of the last epoch,
mean ± standard deviation over volumes, and the last row is over the volumes of all runs. Called
again, it goes on where it was interrupted and repeats nothing.

Run: python benchmarks/runs.py seeds|folds|images dataset_dir output_dir
"""

import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monai.data import partition_dataset

FOLDER = Path(__file__).parent
SPLIT = json.loads((FOLDER.parent / "bundle" / "configs" / "split.json").read_text())
CONFIG = json.loads((FOLDER.parent / "bundle" / "configs" / "train.json").read_text())
EPOCHS, BATCH = CONFIG["max_epochs"], CONFIG["volumes_per_batch"]
Changes = dict[str, object]


def seeds() -> dict[str, Changes]:
    """Ten seeds of the recipe, shortened to a third."""
    return {f"seed {seed}": {"seed": seed, "max_epochs": EPOCHS // 3} for seed in range(10)}


def folds(folder: Path) -> dict[str, Changes]:
    """Five-fold cross-validation over all volumes of the shipped split."""
    names = sorted(SPLIT["training"] + SPLIT["validation"])
    parts = partition_dataset(names, num_partitions=5, shuffle=True)
    runs: dict[str, Changes] = {}
    for number, validation in enumerate(parts):
        training = sorted(name for part in parts if part is not validation for name in part)
        split = {"training": training, "validation": sorted(validation)}
        runs[f"fold {number}"] = {"split_file": write_split(folder, f"fold {number}", split)}
    return runs


def images(folder: Path) -> dict[str, Changes]:
    """The recipe with fewer training volumes and as many iterations."""
    runs: dict[str, Changes] = {}
    shuffled = partition_dataset(SPLIT["training"], ratios=[1], shuffle=True)[0]
    iterations = EPOCHS * math.ceil(len(shuffled) / BATCH)
    for percent in (5, 20, 100):
        training = sorted(shuffled[: round(len(shuffled) * percent / 100)])
        name = f"{len(training)} volumes"
        runs[name] = {
            "split_file": write_split(folder, name, {**SPLIT, "training": training}),
            "max_epochs": iterations // math.ceil(len(training) / BATCH),
        }
    return runs


def write_split(folder: Path, name: str, split: dict[str, list[str]]) -> str:
    """Save a split and return its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(split, indent=4))
    return str(path)


def train(dataset_dir: str, folder: Path, changes: Changes) -> None:
    """Run one training to its end, where it is not yet there; its log is beside its table."""
    epochs = changes.setdefault("max_epochs", EPOCHS)
    table = folder / "training.csv"
    if table.exists() and table.read_text().splitlines()[-1].startswith(f"{epochs},"):
        return
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(FOLDER / "training.py"), dataset_dir, str(folder)]
    for key, value in {"val_interval": epochs, **changes}.items():
        command += [f"--{key}", json.dumps(value)]
    with open(folder / "log.txt", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)


def row(name: str, epochs: str, minutes: str, cases: np.ndarray) -> str:
    """Line of the table from the Dice of cases, ``(volumes, structures)``, the whole last."""
    anterior, posterior, whole = (
        f"{dice.mean():.4f} ± {dice.std():.4f}" for dice in cases.transpose()
    )
    lowest = f"{cases[:, -1].min():.4f}"
    return f"| {' | '.join([name, epochs, minutes, whole, lowest, anterior, posterior])} |"


def main(kind: str, dataset_dir: str, output_dir: str) -> None:
    """Run all trainings of a kind and print the table as they end."""
    folder = Path(output_dir) / kind
    folder.mkdir(parents=True, exist_ok=True)
    runs = seeds() if kind == "seeds" else {"folds": folds, "images": images}[kind](folder)
    print("| run | epochs | minutes | whole | lowest | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found: list[np.ndarray] = []
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(train, dataset_dir, folder / name, runs[name]) for name in runs]
        for name, future in zip(runs, done, strict=True):
            future.result()
            with open(folder / name / "training.csv", newline="") as file:
                epochs, minutes, *_ = list(csv.reader(file))[-1]
            found.append(np.loadtxt(folder / name / "cases.csv", delimiter=","))
            print(row(name, epochs, minutes, found[-1]), flush=True)
    print(row("all", "", "", np.concatenate(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
