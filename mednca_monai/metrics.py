"""Score every case structure by structure, in mm, and write the scores to tables."""

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.data.utils import affine_to_spacing
from monai.handlers.metrics_saver import MetricsSaver
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.metric import CumulativeIterationMetric
from monai.metrics.surface_dice import compute_surface_dice
from monai.utils.dist import string_list_all_gather
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor

from mednca_monai.checks import check_classes, check_int, is_number
from mednca_monai.data import case_name
from mednca_monai.files import whole_file

MEASURES = ("dice", "hd95", "surface_dice")


class CaseMetric(CumulativeIterationMetric):
    """One measure of each structure of each case, for ``monai.handlers.IgniteMetricHandler``.

    The columns are classes 1 to ``num_classes - 1`` and, where these are several, their union,
    "whole". A structure that neither label nor prediction holds is NaN. One that only one of them
    holds gets the worst value: 0, and for ``hd95`` the image's diagonal in mm, which is the root of
    the sum over the axes of (spacing * number of voxels) squared. A surface is all voxels of a
    structure with a face neighbour outside it or outside the image; each counts once.

    Args:
        measure: ``"dice"``; ``"hd95"``, the 95th percentile of the surface distances in mm, of the
            direction where it is larger; ``"surface_dice"``, the share of both surfaces that the
            other is near.
        num_classes: number of classes including background, at least 2.
        tolerance: largest distance in mm that ``surface_dice`` calls near, at least 0.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> label = torch.tensor([[[[0, 1, 1, 2]]]])
        >>> CaseMetric("dice", num_classes=3)(torch.tensor([[[[0, 1, 2, 2]]]]), label)
        tensor([[0.6667, 0.6667, 1.0000]])
    """

    def __init__(self, measure: str, num_classes: int, tolerance: float = 1.0) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {', '.join(MEASURES)}, got {measure!r}.")
        if not (is_number(tolerance) and tolerance >= 0):
            raise ValueError(f"`tolerance` must be finite and at least 0, got {tolerance!r}.")
        self.measure = measure
        self.num_classes = check_int("num_classes", num_classes, 2)
        self.tolerance = tolerance

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Values of a batch of label maps, ``(B, 1, *spatial)``, as ``(B, columns)``.

        The spacing of a case is that of its ``y``, 1 mm where this is not a MetaTensor.

        Raises:
            ValueError: where a label map has another shape or holds anything but class numbers.
        """
        shape = None if y is None else list(y.shape)
        if y is None or shape != list(y_pred.shape):
            raise ValueError(f"`y` must have `y_pred`'s shape, {list(y_pred.shape)}, got {shape}.")
        return torch.stack([self.case(*maps) for maps in zip(y_pred, y, strict=True)])

    def case(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """Values of one case, ``(columns,)``; ``y_pred`` and ``y`` are ``(1, *spatial)``."""
        pred, label = self.masks("y_pred", y_pred), self.masks("y", y)
        size = label.shape[1:]
        affine = getattr(y, "affine", torch.eye(len(size) + 1))
        # all rows count: a 2-D slice of an oblique volume keeps the volume's 4 x 4 affine
        spacing = affine_to_spacing(affine, len(affine) - 1)[: len(size)].tolist()
        found, present = pred.flatten(1).any(1), label.flatten(1).any(1)
        diagonal = math.hypot(*(s * n for s, n in zip(spacing, size, strict=True)))
        values = torch.full(found.shape, diagonal if self.measure == "hd95" else 0.0)
        values[~found & ~present] = torch.nan
        both = found & present
        if both.any():
            values[both] = self.compute(pred[both][None], label[both][None], spacing)[0]
        return values.to(y.device)

    def masks(self, name: str, labels: Tensor) -> Tensor:
        """Turn a label map, ``(1, *spatial)``, into ``(columns, *spatial)``, bool."""
        if labels.dim() not in (3, 4) or len(labels) != 1:
            raise ValueError(
                f"`{name}` must have one channel and 2 or 3 spatial axes per case, "
                f"got shape {list(labels.shape)}."
            )
        # on the CPU, where MONAI computes surface distances alike on all machines
        classes = convert_to_tensor(labels, track_meta=False, device="cpu", dtype=torch.float32)
        check_classes(name, classes, self.num_classes)
        masks = [classes == number for number in range(1, self.num_classes)]
        return torch.cat([*masks, classes > 0] if len(masks) > 1 else masks)

    def compute(self, pred: Tensor, label: Tensor, spacing: Sequence[float]) -> Tensor:
        """MONAI's values, ``(1, C)``, of masks that are not empty, ``(1, C, *spatial)``."""
        if self.measure == "dice":
            return compute_dice(pred, label)
        options: dict[str, Any] = {"include_background": True, "spacing": spacing}
        # a float32 affine makes 0.9 mm 0.90000004 mm, which is not beyond a tolerance of 0.9 mm
        thresholds = [self.tolerance * (1 + 1e-5)] * pred.shape[1]
        with warnings.catch_warnings():
            # MONAI 1.6 warns of an argument that its own code passes
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
            if self.measure == "hd95":
                return compute_hausdorff_distance(pred, label, percentile=95, **options)
            return compute_surface_dice(pred, label, thresholds, **options)

    def aggregate(self) -> Tensor:
        """Mean over cases of the mean over classes, of all but "whole" and NaN, as a scalar."""
        values: Tensor = self.get_buffer()  # type: ignore[no-untyped-call]
        return values[:, : self.num_classes - 1].nanmean(1).nanmean()


class CaseReport(MetricsSaver):
    """Write each case's metrics to ``cases.csv``, and log and write statistics, ``summary.csv``.

    At the end of an evaluator's epoch it takes all ``engine.state.metric_details``, as `CaseMetric`
    fills them, of all ranks, and names each column as in ``dice_anterior`` (of ``val_dice``). Rows
    of ``cases.csv`` are sorted by file name; its empty cells are ``left_out`` of the statistics.
    Rank 0 writes; files are replaced only once both tables are complete.

    Args:
        save_dir: folder of the two files; made where it does not exist.
        label_names: of all classes, background first, as in ``["background", "Anterior"]``.
        out_channels: number of classes that ``label_names`` must name, if given.

    Raises:
        ValueError: where ``label_names`` does not name ``out_channels`` classes, names none but the
            background, or two columns would have the same name.
    """

    def __init__(
        self, save_dir: str, label_names: Sequence[str], out_channels: int | None = None
    ) -> None:
        if out_channels not in (None, len(label_names)):
            raise ValueError(
                f"`label_names` must name {out_channels} classes, got {list(label_names)!r}."
            )
        super().__init__(
            save_dir,
            metric_details="*",
            batch_transform=lambda batch: [item["image"].meta for item in batch],
        )
        names = [name.lower().replace(" ", "_") for name in label_names[1:]]
        self.structures = [*names, "whole"] if len(names) > 1 else names
        if not 0 < len(set(self.structures)) == len(self.structures):
            raise ValueError(
                "`label_names` must be background, then classes that differ from each other "
                f'and from "whole", got {list(label_names)!r}.'
            )

    def __call__(self, engine: Engine) -> None:
        """Write the tables of the epoch that ends.

        Raises:
            ValueError: where a metric does not have one value per case and structure.
        """
        files = string_list_all_gather(self._filenames)
        if idist.get_rank() != 0:
            return
        details: Mapping[str, Tensor] = engine.state.metric_details  # type: ignore[attr-defined]
        expected = [len(files), len(self.structures)]
        columns: dict[str, list[float]] = {}
        for metric, values in details.items():
            if list(values.shape) != expected:
                raise ValueError(
                    f"`{metric}` must have a value per case and structure of `label_names`, "
                    f"{expected}, got {list(values.shape)}."
                )
            measure = metric.removeprefix("val_")
            names = [f"{measure}_{structure}" for structure in self.structures]
            columns.update(zip(names, values.T.tolist(), strict=True))
        rows = sorted(zip(files, *columns.values(), strict=True))
        cases = [[case_name(file), *map(cell, values)] for file, *values in rows]
        summary = [["metric", "mean", "std", "median", "min", "max", "count", "left_out"]]
        summary += [[name, *statistics(values)] for name, values in columns.items()]
        tables = {"cases.csv": [["case", *columns], *cases], "summary.csv": summary}
        write_tables(Path(self.save_dir), tables)
        width = max(len(name) for name, *_ in summary)
        lines = [f"{name:{width}}" + "".join(f"{c:>12}" for c in row) for name, *row in summary]
        engine.logger.info("Metrics of %d cases:\n%s", len(files), "\n".join(lines))


def cell(value: float) -> str:
    """Six decimals, or nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.6f}"


def statistics(column: Sequence[float]) -> list[str]:
    """Cells of mean, standard deviation, median, minimum, maximum, number of values and of NaN."""
    values = np.array([value for value in column if not math.isnan(value)])
    cells = [""] * 5
    if len(values):
        results = (values.mean(), values.std(), np.median(values), values.min(), values.max())
        cells = [cell(float(result)) for result in results]
    return [*cells, str(len(values)), str(len(column) - len(values))]


def write_tables(folder: Path, tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Write rows to CSV files, by name, replacing files only once all tables are on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as parts:
        for name, rows in tables.items():
            part = parts.enter_context(whole_file(folder / name))
            with open(part, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
