"""Trainings of one kind, such as ten seeds or five folds, and a table of what came out.

Two run at a time on one thread each, by `training.py`; the scores are those of the last epoch, mean
± standard deviation over volumes. Called again, it goes on where it was interrupted and repeats
nothing: after a change of the recipe choose another folder.

Run: python benchmarks/runs.py seeds|folds|images dataset_dir output_dir
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monai.data import partition_dataset

from mednca_monai.data import case_name, load_datalist

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
    """The recipe with fewer training volumes, each part in the next, and as many iterations."""
    runs: dict[str, Changes] = {}
    shuffled = np.random.default_rng(0).permutation(SPLIT["training"]).tolist()
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
    epochs = changes.get("max_epochs", EPOCHS)
    table, log = folder / "training.csv", folder / "log.txt"
    if table.exists() and f"\n{epochs}," in "\n" + table.read_text():
        return
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(FOLDER / "training.py"), dataset_dir, str(folder)]
    for key, value in {"val_interval": epochs, **changes}.items():
        command += [f"--{key}", json.dumps(value)]
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code != 0:
        raise RuntimeError(f"A training ended with exit code {code}: see '{log}'.")


def row(name: str, cases: np.ndarray) -> str:
    """Line of the table from the Dice of cases, ``(volumes, structures)``, the whole last."""
    scores = zip(np.nanmean(cases, 0), np.nanstd(cases, 0), strict=True)
    anterior, posterior, whole = (f"{mean:.4f} ± {std:.4f}" for mean, std in scores)
    lowest = f"{np.nanmin(cases[:, -1]):.4f}"
    return f"| {' | '.join([name, whole, lowest, anterior, posterior])} |"


def main(kind: str, dataset_dir: str, output_dir: str) -> None:
    """Run all trainings of a kind and print the table as they end."""
    present = {case_name(case["image"]) for case in load_datalist(dataset_dir, None, "all")}
    missing = {*SPLIT["training"], *SPLIT["validation"]} - present
    if missing:
        raise ValueError(f"`dataset_dir` must hold the shipped split, lacks {sorted(missing)}.")
    folder = Path(output_dir) / kind
    folder.mkdir(parents=True, exist_ok=True)
    runs = seeds() if kind == "seeds" else {"folds": folds, "images": images}[kind](folder)
    print("| run | whole | lowest | anterior | posterior |")
    print("| --- | --- | --- | --- | --- |")
    found: list[np.ndarray] = []
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda name: train(dataset_dir, folder / name, runs[name]), runs)
        for name, _ in zip(runs, ends, strict=True):
            found.append(np.loadtxt(folder / name / "cases.csv", delimiter=",", ndmin=2))
            print(row(name, found[-1]), flush=True)
    if kind == "folds":
        print(row("all", np.concatenate(found)))
    if kind == "seeds":
        print(row("means of the seeds", np.stack([np.nanmean(cases, 0) for cases in found])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=["seeds", "folds", "images"])
    parser.add_argument("dataset_dir")
    parser.add_argument("output_dir")
    main(**vars(parser.parse_args()))
