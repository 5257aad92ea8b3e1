"""Checks of arguments, with messages that give argument, rule and value."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def check_int(name: str, value: object, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``, else raise ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    return value


def check_ints(name: str, value: int | Sequence[int], count: int, of: str) -> list[int]:
    """Return one positive integer for each of ``count`` levels or axes, else raise ValueError."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"`{name}` must be one value or one per {of} ({count}), got {value!r}.")
    return [check_int(name, v, 1) for v in values]


def is_number(value: object) -> bool:
    """Whether a value is a finite number (no bool), of Python or numpy.

    Example:
        >>> [is_number(value) for value in (1, 0.5, float("nan"), float("inf"), True, "1", None)]
        [True, True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(value == value and abs(value) != math.inf)  # NaN differs from itself


def check_finite(name: str, values: Tensor, where: str = "") -> None:
    """Raise ValueError where an image holds NaN or infinite values; ``where`` ends the message."""
    parts = torch.split(values.flatten(), 2**20)  # a mask of a whole image could be as large as it
    count = sum(len(part) - int(part.isfinite().count_nonzero()) for part in parts)
    if count > 0:
        raise ValueError(f"`{name}` must be finite, got {count} NaN or infinite values{where}.")


def check_classes(name: str, labels: Tensor, count: int, where: str = "") -> None:
    """Raise ValueError where a label map holds anything but integers from 0 to ``count`` - 1."""
    known = (labels >= 0) & (labels < count) & (labels % 1 == 0)
    if not bool(known.all()):
        value = float(labels[~known][0])
        raise ValueError(f"`{name}` must hold integers from 0 to {count - 1}, got {value}{where}.")
