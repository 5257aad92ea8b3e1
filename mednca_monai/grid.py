"""Cells on a grid: mirrored borders, the inside of a padded state, sublattices, blocks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Cells of a padded batch that are updated together: some rows of some items.

    Attributes:
        item: first item of the batch.
        items: how many.
        row: first cell along the first spatial axis, not counting the border.
        rows: how many.
    """

    item: int
    items: int
    row: int
    rows: int


class Coarse(NamedTuple):
    """Cells that each stand for a box of finer ones, and where the finer ones begin.

    Attributes:
        cells: ``(B, C, *spatial)``.
        scale_factor: how many finer cells one of them stands for along each axis.
        starts: first of the finer cells, counted from the first that the first coarse cell stands
            for; one place per item of the batch, or one for all.
    """

    cells: Tensor
    scale_factor: list[int]
    starts: list[list[int]]


def enlarge(coarse: Coarse, block: Block, size: list[int]) -> Tensor:
    """Finer cells of a block, each a copy of the coarse one that stands for it.

    Args:
        coarse: of the batch; they stand for all cells of the block.
        block: which of the finer cells.
        size: spatial size of all finer cells.

    Returns:
        ``(block.items, C, block.rows, *size[1:])``.

    Example:
        >>> coarse = Coarse(torch.tensor([[[[1, 2, 3]]]]), scale_factor=[1, 2], starts=[[0, 1]])
        >>> enlarge(coarse, Block(item=0, items=1, row=0, rows=1), size=[1, 5]).flatten().tolist()
        [1, 2, 2, 3, 3]
    """
    starts, items = coarse.starts, block.items  # one place for all items of the block
    if len(starts) > 1:
        starts, items = starts[block.item : block.item + block.items], 1
    parts: list[Tensor] = []
    for item, start in enumerate(starts):
        cells = coarse.cells.narrow(0, block.item + item, items)
        for axis, factor in enumerate(coarse.scale_factor):
            skipped, length = start[axis], size[axis]
            if axis == 0:
                skipped, length = skipped + block.row, block.rows
            first = skipped // factor
            skipped -= first * factor
            covering = (skipped + length + factor - 1) // factor
            cells = cells.narrow(axis + 2, first, covering)
            cells = torch.stack([cells] * factor, axis + 3).flatten(axis + 2, axis + 3)
            cells = cells.narrow(axis + 2, skipped, length)
        parts.append(cells)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def mirrored(position: int, length: int) -> int:
    """Cell of an axis that ``position`` stands for, as ``numpy.pad(mode="reflect")`` has it."""
    period = max(2 * (length - 1), 1)
    return min(position % period, period - position % period)


def reflect_pad(state: Tensor, radius: int) -> Tensor:
    """Pad every spatial axis by ``radius`` cells as ``numpy.pad(mode="reflect")`` does.

    An axis shorter than the radius is reflected repeatedly, one of length 1 is repeated;
    ``torch.nn.functional.pad`` does neither.

    Args:
        state: ``(B, C, *spatial)``.
        radius: cells added on each side.

    Returns:
        ``(B, C, *(n + 2 * radius for n in spatial))``.

    Example:
        >>> reflect_pad(torch.arange(3.0).view(1, 1, 3), 4).flatten().tolist()
        [0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0]
    """
    for axis in range(2, state.dim()):
        length = state.shape[axis]
        positions = torch.arange(-radius, length + radius, device=state.device)
        # a tensor, since the ONNX exporter takes no remainder by a size that it does not know
        period = (2 * (positions[-1:] - radius)).clamp_min(1)
        positions = positions % period
        state = state.index_select(axis, torch.minimum(positions, period - positions))
    return state


def reflect(padded: Tensor, radius: int) -> None:
    """Make the border of a padded state the mirror image of its inside, in place."""
    for axis in range(2, padded.dim()):
        length = padded.shape[axis] - 2 * radius
        for i in list(range(-radius, 0)) + list(range(length, length + radius)):
            source = padded.narrow(axis, radius + mirrored(i, length), 1)
            padded.narrow(axis, radius + i, 1).copy_(source)


def unreflect(padded: Tensor, radius: int) -> None:
    """Add the border to the cells that it mirrors, in place: the adjoint of `reflect`."""
    for axis in range(padded.dim() - 1, 1, -1):
        length = padded.shape[axis] - 2 * radius
        for i in list(range(-radius, 0)) + list(range(length, length + radius)):
            border = padded.narrow(axis, radius + i, 1)
            padded.narrow(axis, radius + mirrored(i, length), 1).add_(border)
            border.zero_()


def interior(padded: Tensor, radius: int) -> Tensor:
    """View of a padded state without its border."""
    for axis in range(2, padded.dim()):
        padded = padded.narrow(axis, radius, padded.shape[axis] - 2 * radius)
    return padded


def lattice(state: Tensor, first: list[int], stride: int) -> Tensor:
    """View of every ``stride``-th cell along each axis, from cell ``first`` on."""
    state = state[:, :, first[0] :: stride, first[1] :: stride]
    if len(first) == 3:
        state = state[:, :, :, :, first[2] :: stride]
    return state


def part(padded: Tensor, block: Block, radius: int) -> Tensor:
    """View of a block with its border."""
    items = padded.narrow(0, block.item, block.items)
    return items.narrow(2, block.row, block.rows + 2 * radius)


def blocks(shape: list[int], radius: int, cells: int) -> list[Block]:
    """Cut a batch into blocks of about ``cells`` cells: several items, or rows of one item.

    Blocks of rows start at even rows and are no lower than ``radius``, but for an item's last.

    Args:
        shape: of the batch without borders, ``(B, C, *spatial)``.
        radius: of the neighbourhood.
        cells: at least 1.

    Example:
        >>> blocks([1, 16, 5, 100], radius=1, cells=250)
        [Block(item=0, items=1, row=0, rows=2), Block(item=0, items=1, row=2, rows=2), \
Block(item=0, items=1, row=4, rows=1)]
    """
    row = 1
    for length in shape[3:]:
        row *= length
    items = max(cells // (row * shape[2]), 1)
    rows = shape[2]
    if row * shape[2] > cells:
        rows = max(cells // row, radius + 1, 2) // 2 * 2
    result: list[Block] = []
    for item in range(0, shape[0], items):
        for first in range(0, shape[2], rows):
            size = min(items, shape[0] - item), min(rows, shape[2] - first)
            result.append(Block(item, size[0], first, size[1]))
    return result
