"""Trainings of one kind, such as ten seeds or five folds, and a table of what came out.

- seeds: ten of the recipe, shortened to a third;
- folds: five-fold cross-validation, also at more steps;
- images: 5, 20 and 100 % of the training volumes, all for a third of the recipe's iterations, and
  `BasicUNet` on the same;
- networks: the recipe by each network, UNets for 30 epochs;
- front: other channels, hidden sizes, steps and levels, a third of the recipe's length;
- causes: 14 epochs of two levels on small patches without varied iterations or a bound of the
  states, other fire rates, steps, scales and patches;
- paper: the paper's network and optimizer on slices, five seeds with all safeguards, then without
  each and without any.

Two run at a time on one thread each, by `training.py`; the scores are those of the last epoch, mean
± standard deviation over volumes; rms is the largest root mean square of a state in the log. Called
again, it goes on where it was interrupted and repeats nothing: after a change of the recipe choose
another folder.

Run: python benchmarks/runs.py seeds|folds|images|networks|front|causes|paper dataset_dir output_dir
[--key JSON ...] (more changes of the config for all of them)
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measure import BUNDLE, FOLDER, OVERLAYS, config_changes
from monai.data import partition_dataset
from more_steps import evaluate

from mednca_monai.data import case_name, load_datalist

SPLIT = json.loads((BUNDLE / "configs" / "split.json").read_text())
CONFIG = json.loads((BUNDLE / "configs" / "train.json").read_text())
EPOCHS, BATCH = CONFIG["max_epochs"], CONFIG["volumes_per_batch"]
UNET_EPOCHS = 30  # after 24 none improves
PAPER_EPOCHS = 12  # of 29 iterations of 20 slices
WITHOUT = {
    "clipping": {"train#handlers#3#max_norm": 1e9},
    "averaging": {"ema_momentum": 1.0},
    "variants": {"train#handlers#4#last_epochs": 0},
    "bound": {"train#handlers#2#bound": 1e30},  # of the states
    "one cycle": {
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.ConstantLR",
            "optimizer": "@optimizer",
            "factor": 1.0,
        }
    },
}  # the safeguards, by what leaves them out
TWO_LEVELS = {
    "num_levels": 2,
    "scale_factor": 4,
    "num_channels": 12,
    "hidden_size": 96,
    "steps": 16,
}
Changes = dict[str, Any]  # of the configs; ``overlay`` lists files, ``split`` is the split itself


def network(**changes: Any) -> Changes:
    """Changes of the network's arguments."""
    return {f"network_def#{key}": value for key, value in changes.items()}


def seeds() -> dict[str, Changes]:
    """Ten seeds of the recipe, shortened to a third."""
    return {f"seed {seed}": {"seed": seed, "max_epochs": EPOCHS // 3} for seed in range(10)}


def folds() -> dict[str, Changes]:
    """Five-fold cross-validation over all volumes of the shipped split."""
    names = sorted(SPLIT["training"] + SPLIT["validation"])
    parts = partition_dataset(names, num_partitions=5, shuffle=True)
    runs: dict[str, Changes] = {}
    for number, validation in enumerate(parts):
        training = sorted(name for part in parts if part is not validation for name in part)
        runs[f"fold {number}"] = {"split": {"training": training, "validation": sorted(validation)}}
    return runs


def images() -> dict[str, Changes]:
    """Fewer training volumes, each part in the next, and as many iterations (a third)."""
    runs: dict[str, Changes] = {}
    shuffled = np.random.default_rng(0).permutation(SPLIT["training"]).tolist()
    iterations = EPOCHS // 3 * math.ceil(len(shuffled) / BATCH)
    for kind in ("MedNCA", "BasicUNet"):
        for percent in (5, 20, 100):
            training = sorted(shuffled[: round(len(shuffled) * percent / 100)])
            name = f"{kind}, {len(training)} volumes"
            runs[name] = {
                "overlay": OVERLAYS[kind],
                "split": {**SPLIT, "training": training},
                "max_epochs": iterations // math.ceil(len(training) / BATCH),
            }
    return runs


def networks() -> dict[str, Changes]:
    """The recipe by each network, UNets for as long as they improve, validated every six epochs."""
    runs: dict[str, Changes] = {}
    for name, files in OVERLAYS.items():
        epochs = EPOCHS if name == "MedNCA" else UNET_EPOCHS
        runs[name] = {"overlay": files, "val_interval": 6, "max_epochs": epochs}
    return runs


def front() -> dict[str, Changes]:
    """Other sizes of the network, shortened to a third."""
    two = TWO_LEVELS
    sizes = {
        "10 and 64, 20 + 15 + 10": {},
        "12 and 96, 20 + 15 + 10": {"num_channels": 12, "hidden_size": 96},
        "8 and 64, 16 + 16": two | {"num_channels": 8, "hidden_size": 64},
        "12 and 96, 8 + 8": two | {"steps": 8},
        "12 and 96, 16 + 16": two,
        "12 and 96, 24 + 24": two | {"steps": 24},
        "16 and 128, 16 + 16": two | {"num_channels": 16, "hidden_size": 128},
    }  # channels and hidden size, steps from coarse to fine
    short = {"max_epochs": EPOCHS // 3}
    return {name: short | network(**size) for name, size in sizes.items()}


def causes() -> dict[str, Changes]:
    """14 epochs of two levels on small patches at the usual steps, and what changes do."""
    half, longer = {"fire_rate": 0.5}, {"steps": 24}
    changes = {
        "fire rate 0.5": half,
        "fire rate 0.5, 24 + 24 steps": half | longer,
        "fire rate 0.5, scale factor 2": half | {"scale_factor": 2},
        "fire rate 0.75": {"fire_rate": 0.75},
        "fire rate 0.9": {},
        "fire rate 1": {"fire_rate": 1.0},
        "fire rate 1, 24 + 24 steps": {"fire_rate": 1.0} | longer,
        "fire rate 0.9, patches of 28 x 38 x 28": {},
    }
    usual = {"train#handlers#4#steps": [1, 1], **WITHOUT["variants"], **WITHOUT["bound"]}
    short = {"max_epochs": 14, "roi_size": [20, 24, 20]} | usual
    runs = {name: short | network(**TWO_LEVELS | change) for name, change in changes.items()}
    runs["fire rate 0.9, patches of 28 x 38 x 28"]["roi_size"] = [28, 38, 28]
    return runs


def paper() -> dict[str, Changes]:
    """Five seeds of the paper's network and optimizer, then each safeguard left out, then all."""
    setting = {"overlay": ["paper.json"], "max_epochs": PAPER_EPOCHS}
    runs: dict[str, Changes] = {f"seed {seed}": {**setting, "seed": seed} for seed in range(5)}
    runs |= {f"without {name}": {**setting, **changes} for name, changes in WITHOUT.items()}
    runs["without any"] = dict(setting)
    for changes in WITHOUT.values():
        runs["without any"] |= changes
    return runs


KINDS = {
    function.__name__: function
    for function in (seeds, folds, images, networks, front, causes, paper)
}


def has_ended(folder: Path, epochs: int) -> bool:
    """Whether the training of a folder has run to its end."""
    table = folder / "training.csv"
    return table.exists() and f"\n{epochs}," in "\n" + table.read_text()


def train(dataset_dir: str, folder: Path, changes: Changes) -> str:
    """Run one training to its end, where it is not yet there; its last log is beside its table.

    Returns:
        Why it diverged, or nothing.
    """
    changes, epochs = dict(changes), changes.get("max_epochs", EPOCHS)
    log, diverged = folder / "log.txt", folder / "diverged.txt"
    if has_ended(folder, epochs):
        return ""
    if diverged.exists():
        return diverged.read_text()
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(FOLDER / "training.py"), dataset_dir, str(folder)]
    for overlay in changes.pop("overlay", []):
        command += ["--overlay", str(FOLDER / overlay)]
    if "split" in changes:
        path = folder / "split.json"
        path.write_text(json.dumps(changes.pop("split"), indent=4))
        changes["split_file"] = str(path)
    for key, value in {"val_interval": epochs, **changes}.items():
        command += [f"--{key}", json.dumps(value)]
    with open(log, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code == 0:
        return ""
    last = "".join(log.read_text().splitlines()[-1:])
    if not last.startswith("FloatingPointError"):
        raise RuntimeError(f"A training ended with exit code {code}: see '{log}'.")
    diverged.write_text(last)
    return last


def row(name: str, cases: np.ndarray) -> str:
    """Line of the table from the Dice of cases, ``(volumes, structures)``, the whole last."""
    scores = zip(np.nanmean(cases, 0), np.nanstd(cases, 0), strict=True)
    anterior, posterior, whole = (f"{mean:.4f} ± {std:.4f}" for mean, std in scores)
    lowest = f"{np.nanmin(cases[:, -1]):.4f}"
    return f"| {' | '.join([name, whole, lowest, anterior, posterior])} |"


def largest_state(log: str) -> str:
    """Largest root mean square of a state that a log tells; nothing where it tells none."""
    states = re.findall(r"state_rms_\d+: (\S+)", log)
    return f"{max(map(float, states)):.4g}" if states else ""


def more_steps(dataset_dir: str, folder: Path, factor: float, changes: Changes) -> str:
    """Dice of the whole by a training of its own split, at other steps; kept in its folder."""
    kept = folder / f"steps_{factor}.txt"
    if not kept.exists():
        files = {
            "split_file": str(folder / "split.json"),
            "ckpt_path": str(folder / "checkpoints" / "best.pt"),
        }
        _, summary = evaluate(dataset_dir, factor, **changes | files)
        kept.write_text(f"{float(summary['dice_whole']['mean']):.4f}")
    return kept.read_text()


def difference(name: str, cases: np.ndarray, others: np.ndarray) -> str:
    """Line on paired differences to other Dice of the same cases: mean ± standard error."""
    differences = cases - others
    kinds = {"whole": differences[:, -1], "mean of the parts": differences[:, :-1].mean(1)}
    scores = (
        f"{kind} {values.mean():+.4f} ± {values.std() / len(values) ** 0.5:.4f}"
        for kind, values in kinds.items()
    )
    return f"{name}: {', '.join(scores)}"


def main(kind: str, dataset_dir: str, output_dir: str, changes: Changes) -> None:
    """Run all trainings of a kind, with more changes, and print the table as they end."""
    present = {case_name(case["image"]) for case in load_datalist(dataset_dir, None, "all")}
    missing = {*SPLIT["training"], *SPLIT["validation"]} - present
    if missing:
        raise ValueError(f"`dataset_dir` must hold the shipped split, lacks {sorted(missing)}.")
    folder = Path(output_dir) / kind
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: run | changes for name, run in KINDS[kind]().items()}
    factors = [2, 4] if kind == "folds" else []
    columns = ["run", "whole", "lowest", "anterior", "posterior", "minutes", "rms"]
    columns += [f"{factor} times the steps" for factor in factors]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    found: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(2) as pool:
        diverged = pool.map(lambda name: train(dataset_dir, folder / name, runs[name]), runs)
        for name, divergence in zip(runs, diverged, strict=True):
            if divergence:
                print(f"| {name} | {divergence} |", flush=True)
                continue
            found[name] = np.loadtxt(folder / name / "cases.csv", delimiter=",", ndmin=2)
            minutes = (folder / name / "training.csv").read_text().splitlines()[-1].split(",")[1]
            rms = largest_state((folder / name / "log.txt").read_text())
            ends = [f"{float(minutes):.0f}", rms]
            ends += [more_steps(dataset_dir, folder / name, n, changes) for n in factors]
            print(f"{row(name, found[name])} {' | '.join(ends)} |", flush=True)
    if kind == "folds" and found:
        print(f"{row(f'all of {len(found)} folds', np.concatenate([*found.values()]))} |")
    if kind == "seeds" and found:
        means = np.stack([np.nanmean(cases, 0) for cases in found.values()])
        print(f"{row(f'means of {len(found)} seeds', means)} |")
    if kind in ("networks", "images"):
        for name, cases in found.items():
            other, *volumes = name.split(", ")
            ours = ", ".join(["MedNCA", *volumes])
            if name != ours and ours in found:
                print(difference(f"{ours} over {other}", found[ours], cases))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("dataset_dir")
    parser.add_argument("output_dir")
    arguments, rest = parser.parse_known_args()
    main(**vars(arguments), changes=config_changes(parser, rest))
