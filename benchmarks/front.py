"""Accuracy against cost: Dice against time and parameters, of our settings and of UNets.

Dice of the whole hippocampus is what `runs.py front` and `runs.py networks` have left in
``output_dir``; the time is that of a volume of the data's size, each network in a fresh process.
Settings are named by channels and hidden size, and by steps from coarse to fine; they were trained
for a third of the recipe, the networks as the recipe or their overlays say.

Run: python benchmarks/front.py output_dir [picture.png]
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from inference import SIZES, measure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from measure import alone
from runs import front, has_ended, networks

mpl.use("Agg")


def draw(found: list[tuple[str, int, float, float, int]], path: str) -> None:
    """Save a picture of Dice against seconds and against parameters."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    lengths = sorted({epochs for _, epochs, *_ in found})
    for name, epochs, dice, *costs in found:
        marker = "os^"[lengths.index(epochs)]
        for axis, cost in zip(axes, costs, strict=True):
            axis.semilogx(cost, dice, marker, label=f"{name} ({epochs} epochs)")
    titles = {"time of a volume": ("s", (1, 2, 5)), "parameters": ("", (1, 3))}
    for axis, (title, (unit, ticks)) in zip(axes, titles.items(), strict=True):
        axis.set(xlabel=title)
        axis.xaxis.set(major_locator=LogLocator(subs=ticks), major_formatter=EngFormatter(unit))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="Dice, whole hippocampus")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main(output_dir: str, picture: str) -> None:
    """Print the table and draw it."""
    runs = [
        (Path(output_dir) / kind.__name__ / name, changes)
        for kind in (front, networks)
        for name, changes in kind().items()
    ]
    for folder, changes in runs:
        if not has_ended(folder, changes["max_epochs"]):
            raise ValueError(f"`output_dir` must hold trainings that ended, got no '{folder}'.")
    print("| network | parameters | seconds | epochs | minutes | whole | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found: list[tuple[str, int, float, float, int]] = []
    for folder, changes in runs:
        cases = np.loadtxt(folder / "cases.csv", delimiter=",", ndmin=2)
        anterior, posterior, whole = np.nanmean(cases, 0)
        epochs, minutes, *_ = (folder / "training.csv").read_text().splitlines()[-1].split(",")
        overlays = changes.pop("overlay", [])
        count, _, seconds, _ = alone(measure, overlays, changes, SIZES[0])
        found.append((folder.name, int(epochs), whole, seconds, count))
        length = f"{epochs} | {float(minutes):.0f}"
        scores = f"{whole:.4f} | {anterior:.4f} | {posterior:.4f}"
        print(f"| {folder.name} | {count:,} | {seconds:.3f} | {length} | {scores} |", flush=True)
    draw(found, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output_dir")
    parser.add_argument("picture", nargs="?", default="front.png")
    main(**vars(parser.parse_args()))
