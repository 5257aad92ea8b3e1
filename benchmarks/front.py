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
    costs_of = {"time of a volume": (1, EngFormatter("s")), "parameters": (2, EngFormatter())}
    for axis, (title, (column, formatter)) in zip(axes, costs_of.items(), strict=True):
        for kind, points in found.items():
            dice, costs = ([point[i] for point in points.values()] for i in (0, column))
            axis.semilogx(costs, dice, "o", label=kind)
            for name, cost, value in zip(points, costs, dice, strict=True):
                place = {"xytext": (4, 4), "textcoords": "offset points"}
                axis.annotate(name, (cost, value), fontsize=7, **place)
        axis.set(xlabel=title)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter=formatter)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelsize=8)
        axis.margins(x=0.3)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="Dice, whole hippocampus")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(output_dir: str, picture: str) -> None:
    """Print the table and draw it."""
    runs = [(kind, name, changes) for kind in (front, networks) for name, changes in kind().items()]
    folders = [Path(output_dir) / kind.__name__ / name for kind, name, _ in runs]
    for folder, (_, _, changes) in zip(folders, runs, strict=True):
        if not has_ended(folder, changes["max_epochs"]):
            raise ValueError(f"`output_dir` must hold trainings that ended, got no '{folder}'.")
    print("| network | parameters | seconds | whole | anterior | posterior |")
    print("| --- | --- | --- | --- | --- | --- |")
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for folder, (kind, name, changes) in zip(folders, runs, strict=True):
        cases = np.loadtxt(folder / "cases.csv", delimiter=",", ndmin=2)
        anterior, posterior, whole = np.nanmean(cases, 0)
        overlays = changes.pop("overlay", [])
        count, _, seconds, _ = alone(measure, overlays, changes, SIZES[0])
        label = "a third of the recipe" if kind is front else "the recipe"
        label = label if kind is front or name == "MedNCA" else "UNets"
        found.setdefault(label, {})[name] = (whole, seconds, count)
        scores = f"{whole:.4f} | {anterior:.4f} | {posterior:.4f}"
        print(f"| {name} | {count:,} | {seconds:.3f} | {scores} |", flush=True)
    draw(found, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output_dir")
    parser.add_argument("picture", nargs="?", default="front.png")
    main(**vars(parser.parse_args()))
