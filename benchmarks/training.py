"""Train as the bundle does, or an overlay of it, and note Dice against minutes in a table.

The table, ``training.csv`` in the output folder, has a line per validation: epoch, minutes since
the start, validations included, and mean Dice of each structure, the whole last. ``training.png``
shows it; ``cases.csv`` has each volume's Dice in the last validation. A training that was
interrupted goes on where it was.

Run: python benchmarks/training.py dataset_dir output_dir [--overlay file.json] [--key JSON ...]
(`--overlay benchmarks/unet.json` trains MONAI's UNet on the same data, a further `--overlay
benchmarks/basic_unet.json` or `dyn_unet.json` these)
Two processes: OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/training.py dataset_dir
output_dir --overlay bundle/configs/multi_gpu_train.json --volumes_per_batch 1
"""

import argparse
import csv
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import matplotlib.pyplot as plt
import numpy as np
from ignite.engine import Engine, Events
from measure import BUNDLE, config_changes
from monai.bundle import ConfigParser


def note(path: Path, start: float, trainer: Engine, evaluator: Engine) -> None:
    """Add a line to the table."""
    cases = evaluator.state.metric_details["val_dice"]  # type: ignore[attr-defined]
    np.savetxt(path.with_name("cases.csv"), cases.cpu(), fmt="%.4f", delimiter=",")
    dice = cases.nanmean(0).tolist()
    row = [trainer.state.epoch, f"{(time.time() - start) / 60:.2f}", *(f"{d:.4f}" for d in dice)]
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow(row)
    print(*row, flush=True)


def draw(path: Path) -> None:
    """Draw a table as a picture beside it."""
    _, minutes, *structures, whole = zip(*csv.reader(path.open()), strict=True)
    lines = {"whole": np.array(whole, float)}
    if structures:
        lines["mean of the structures"] = np.array(structures, float).mean(0)
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, dice in lines.items():
        axis.plot(np.array(minutes, float), dice, "o-", label=name)
    axis.set(xlabel="minutes", ylabel="Dice, validation volumes", ylim=(0.7, 0.93))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def train(dataset_dir: str, output_dir: str, overlay: list[str], changes: dict[str, Any]) -> None:
    """Run the training of ``configs/train.json`` with ``overlay`` and ``changes`` over it."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / "train.json"), *overlay])
    unknown = [key for key in changes if key.split("#")[0] not in parser]
    if unknown:
        raise ValueError(f"`--key` must be one of the configs', got {unknown}.")
    parser.update(
        {"bundle_root": str(BUNDLE), "dataset_dir": dataset_dir, "output_dir": output_dir} | changes
    )
    parser.get_parsed_content("initialize")
    trainer = parser.get_parsed_content("train#trainer")
    evaluator = parser.get_parsed_content("validate#evaluator")
    path = Path(output_dir) / "training.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    clock, start = path.with_name("seconds.txt"), time.time()
    if clock.exists():  # resumed
        start -= float(clock.read_text())
    first = idist.get_rank() == 0
    if first:

        @trainer.on(Events.EPOCH_COMPLETED)
        def note_seconds() -> None:
            clock.write_text(str(time.time() - start))

        noting = partial(note, path, start, trainer, evaluator)
        evaluator.add_event_handler(Events.COMPLETED, noting)
    trainer.run()
    parser.get_parsed_content("finalize")
    if path.exists() and first:
        draw(path)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset_dir")
    parser.add_argument("output_dir")
    parser.add_argument("--overlay", action="append", default=[])
    arguments, rest = parser.parse_known_args()
    changes = config_changes(parser, rest)
    train(arguments.dataset_dir, arguments.output_dir, arguments.overlay, changes)
