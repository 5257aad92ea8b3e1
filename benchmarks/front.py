"""Accuracy against cost: Dice against time and parameters, of our settings and of UNets.

Dice of the whole hippocampus is what `runs.py front` and `runs.py networks` have left in
``output_dir``; the time is that of a volume of the data's size, each network in a fresh process.
Settings are named by channels and hidden size, and by steps from coarse to fine; they were trained
for a third of the recipe.

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


def draw(found: dict[str, dict[str, tuple[float, float, float]]], path: str) -> None:
    """Save a picture of Dice against seconds and against parameters."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    costs = {"time of a volume": (1, EngFormatter("s")), "parameters": (2, EngFormatter())}
    for axis, (title, (column, formatter)) in zip(axes, costs.items(), strict=True):
        for marker, (kind, points) in zip("os^", found.items(), strict=False):
            for name, point in points.items():
                axis.semilogx(point[column], point[0], marker, label=f"{name} ({kind})")
        axis.set(xlabel=title)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=formatter)
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
    print("| network | parameters | seconds | whole | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- |")
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for folder, changes in runs:
        cases = np.loadtxt(folder / "cases.csv", delimiter=",", ndmin=2)
        anterior, posterior, whole = np.nanmean(cases, 0)
        overlays = changes.pop("overlay", [])
        count, _, seconds, _ = alone(measure, overlays, changes, SIZES[0])
        length = f"{changes['max_epochs']} epochs"
        found.setdefault(length, {})[folder.name] = (whole, seconds, count)
        scores = f"{whole:.4f} | {anterior:.4f} | {posterior:.4f}"
        print(f"| {folder.name} | {count:,} | {seconds:.3f} | {scores} |", flush=True)
    draw(found, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output_dir")
    parser.add_argument("picture", nargs="?", default="front.png")
    main(**vars(parser.parse_args()))
