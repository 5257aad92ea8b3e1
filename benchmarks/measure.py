"""What the benchmarks share: networks, arguments, memory, fresh processes, interleaved timing."""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mednca_monai.inferers import return_freed_memory

FOLDER = Path(__file__).parent
BUNDLE = FOLDER.parent / "bundle"
OVERLAYS = {
    "MedNCA": [],
    "UNet": ["unet.json"],
    "BasicUNet": ["unet.json", "basic_unet.json"],
    "DynUNet": ["unet.json", "dyn_unet.json"],
}  # of configs/train.json, by network


def config_changes(parser: argparse.ArgumentParser, rest: list[str]) -> dict[str, Any]:
    """Changes of a config from the rest of a command line: pairs of --key and JSON."""
    if len(rest) % 2 or not all(key.startswith("--") for key in rest[::2]):
        parser.error(f"expected pairs of --key and JSON, got {rest}")
    changes = {}
    for key, value in zip(rest[::2], rest[1::2], strict=True):
        try:
            changes[key.removeprefix("--")] = json.loads(value)
        except json.JSONDecodeError:
            parser.error(f"{key} must be followed by JSON, got {value}")
    return changes


def peak() -> float:
    """Peak resident memory of this process in MiB (Linux); getrusage counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def resident() -> float:
    """Resident memory of this process in MiB (Linux with glibc), freed memory given back."""
    return_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, after one call of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
