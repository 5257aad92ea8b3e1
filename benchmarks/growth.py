"""How time and memory of inference grow, and how near to the machine's peaks a step runs.

One factor at a time is changed from the setting 256², 16 channels, hidden layer 64, 16 + 16 steps,
one image. Operations are those of the firing half of the cells, per step and cell of a level
fire_rate * 2 * (P + H * (C - in_channels)), where P, from the neighbourhood to the hidden layer, is
9 * C * H in one product or 9 * C * 2 * C + 3 * C * H in two; bytes are those that must pass through
main memory where a state does not fit the cache, 20 * C (read, change written, both read, sum
written).

Run: python benchmarks/growth.py [picture.png]
"""

import sys
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from measure import alone, interleaved, peak, resident
from torch import nn

from mednca_monai import MedNCA

mpl.use("Agg")
START = {"pixels": 256 * 256, "channels": 16, "hidden": 64, "steps": 16, "batch": 1, "levels": 2}
FACTORS = {
    "pixels": [1 / 4, 1, 4, 16],
    "channels": [1 / 2, 1, 2, 4],
    "hidden": [1 / 2, 1, 2, 4],
    "steps": [1 / 4, 1, 2, 4],
    "batch": [1, 2, 4, 8],
    "levels": [1 / 2, 1, 3 / 2],
}
REPEATS = 3


def build(setting: dict[str, int], firing: str) -> tuple[nn.Module, torch.Tensor, float, float]:
    """Network, images, and the operations and bytes of a forward pass."""
    torch.manual_seed(0)
    channels, hidden, steps = setting["channels"], setting["hidden"], setting["steps"]
    network = MedNCA(
        2,
        1,
        1,
        num_channels=channels,
        hidden_size=hidden,
        steps=steps,
        num_levels=setting["levels"],
        firing=firing,
    ).eval()
    for level in network.levels:
        nn.init.normal_(level.update.weight, std=0.01)
    size = round(setting["pixels"] ** 0.5)
    cells = sum(size**2 / 16**level for level in range(setting["levels"])) * setting["batch"]
    level, images = network.levels[0], torch.rand(setting["batch"], 1, size, size)
    one_product = len(level.rule(level.folds(images))) == 3
    around = 9 * hidden if one_product else 9 * 2 * channels + 3 * hidden
    products = channels * around + hidden * (channels - 1)
    operations = cells * steps * 0.5 * 2 * products
    moved = cells * steps * 20 * channels
    return network, images, operations, moved


def case(setting: dict[str, int], firing: str) -> tuple[float, float, float, float]:
    """Median seconds, MiB of the first call, GFLOP/s, GB/s."""
    network, images, operations, moved = build(setting, firing)
    with torch.no_grad():
        network(images[:1, :, :16, :16])
        before = resident()
        network(images)
        more = peak() - before
        seconds = interleaved({"": lambda: network(images)}, REPEATS)[""]
    return seconds, more, operations / seconds / 1e9, moved / seconds / 1e9


def peaks() -> tuple[float, float]:
    """GFLOP/s of a large matrix product and GB/s (read and written) of a large copy."""
    matrix, numbers, copied = torch.rand(2048, 2048), torch.rand(2**26), torch.empty(2**26)
    best = {"product": float("inf"), "copy": float("inf")}
    for _ in range(10):
        for name, run in (
            ("product", lambda: matrix @ matrix),
            ("copy", lambda: copied.copy_(numbers)),
        ):
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return 2 * 2048**3 / best["product"] / 1e9, 2 * 4 * 2**26 / best["copy"] / 1e9


if __name__ == "__main__":
    products, copies = alone(peaks)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"peaks: {products:.0f} GFLOP/s (matrix product), {copies:.0f} GB/s (copy)\n")
    print("| setting | firing | seconds | MiB | GFLOP/s | of peak | GB/s | of peak |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    found = {}
    for factor, values in FACTORS.items():
        for value in values:
            setting = {**START, factor: round(START[factor] * value)}
            for firing in ("independent", "sublattices"):
                key = (firing, *setting.values())
                if key not in found:
                    found[key] = alone(case, setting, firing)
                    seconds, more, rate, speed = found[key]
                    title = ", ".join(f"{n} {name}" for name, n in setting.items())
                    print(
                        f"| {title} | {firing} | {seconds:.4f} | {more:.0f} | {rate:.0f} | "
                        f"{rate / products:.0%} | {speed:.1f} | {speed / copies:.0%} |",
                        flush=True,
                    )
        settings = [{**START, factor: round(START[factor] * value)} for value in values]
        rows = [found[("independent", *setting.values())] for setting in settings]
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.loglog(values, [row[column] for row in rows], "o-", label=factor)
    for axis, name in zip(axes, ("seconds", "MiB"), strict=True):
        axis.set(xlabel="times the middle setting", ylabel=name)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "growth.png", dpi=110)
