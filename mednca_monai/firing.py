"""Which cells fire: a pure function of seed, level, step and absolute cell position."""

import torch
from torch import Tensor


def absorb(digest: Tensor, word: Tensor) -> Tensor:
    """Absorb a 32-bit word into a 32-bit digest, all in unsigned 32-bit arithmetic held in int64.

    ``x = (digest ^ word) + 0x9E3779B9`` is mixed by ``x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15;
    x *= 0x735A2D97; x ^= x >> 15``, each sum and product modulo 2**32. Both factors are below
    2**31, so no product overflows an int64 and every backend gives the same bits.

    Reference:
        Wellons, C., "Prospecting for hash functions", 2018, https://github.com/skeeto/hash-prospector.

    Example:
        >>> hex(int(absorb(torch.tensor(0), torch.tensor(0))))
        '0x64625032'
    """
    x = (digest ^ word).add_(0x9E3779B9).bitwise_and_(0xFFFFFFFF)
    x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(0xFFFFFFFF)
    x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(0xFFFFFFFF)
    return x.bitwise_xor_(x >> 15)


def step_digests(seed: Tensor, level: int, steps: int) -> Tensor:
    """Digests of seed (its low, then its high 32 bits), level and step.

    Args:
        seed: int64, ``(B,)``.
        level: number of the level.
        steps: number of steps.

    Returns:
        int64, ``(steps, B)``.
    """
    digest = absorb(torch.zeros_like(seed), seed & 0xFFFFFFFF)
    digest = absorb(digest, (seed >> 32) & 0xFFFFFFFF)
    digest = absorb(digest, torch.full_like(seed, level))
    return absorb(digest, torch.arange(steps, device=seed.device).unsqueeze(1))


def row_digests(digests: Tensor, start: Tensor, rows: int) -> Tensor:
    """Digests that have absorbed the absolute position along the first spatial axis as well.

    Args:
        digests: of `step_digests`, ``(steps, B)``.
        start: absolute position of the first row, int64, ``(B,)``.
        rows: number of cells along the first spatial axis.

    Returns:
        int64, ``(steps, B, rows)``.
    """
    positions = start.unsqueeze(1) + torch.arange(rows, device=start.device)
    return absorb(digests.unsqueeze(2), positions)


def independent_fires(digest: Tensor, start: Tensor, size: list[int], threshold: int) -> Tensor:
    """Each cell fires by itself, with probability ``threshold / 2**32``.

    The digest of its row absorbs the cell's absolute position along the other axes, one after the
    other; the cell fires where the result is below the threshold.

    Args:
        digest: of one step of `row_digests`, ``(B, rows)``.
        start: absolute position of the first cell along the other axes, ``(B, spatial_dims - 1)``.
        size: number of cells along the other axes.
        threshold: from 0 (no cell fires) to 2**32 (all do).

    Returns:
        Booleans ``(B, 1, rows, *size)``.
    """
    for axis, length in enumerate(size):
        positions = start[:, axis : axis + 1] + torch.arange(length, device=start.device)
        shape = [positions.shape[0]] + [1] * (axis + 1) + [length]
        digest = absorb(digest.unsqueeze(-1), positions.view(shape))
    return (digest < threshold).unsqueeze(1)


def drawn_sublattices(digest: Tensor, spatial_dims: int) -> Tensor:
    """Which of the sublattices of even and odd positions fire: half of them, in a whole batch.

    Cells at odd positions along some axes belong to the sublattice whose number has these bits set
    (axis 0 is bit 0). The digest absorbs each number; the half with the smallest results fires.

    Args:
        digest: of `step_digests`, of the batch's first item, ``(steps,)``.
        spatial_dims: number of axes.

    Returns:
        Booleans ``(steps, 2**spatial_dims)``.
    """
    draws = absorb(digest.unsqueeze(-1), torch.arange(1 << spatial_dims, device=digest.device))
    smaller = draws.unsqueeze(-1) > draws.unsqueeze(-2)
    return smaller.sum(-1) < draws.shape[-1] // 2


def sublattice_fires(drawn: Tensor, start: Tensor, size: list[int]) -> Tensor:
    """The cells of some sublattices fire.

    Args:
        drawn: of one step of `drawn_sublattices`, ``(2**spatial_dims,)``.
        start: absolute position of the first cell, ``(B, spatial_dims)``.
        size: number of cells along each axis.

    Returns:
        Booleans ``(B, 1, *size)``.
    """
    sublattice = torch.zeros([start.shape[0], 1], dtype=torch.int64, device=start.device)
    for axis, length in enumerate(size):
        positions = start[:, axis : axis + 1] + torch.arange(length, device=start.device)
        shape = [positions.shape[0]] + [1] * (axis + 1) + [length]
        sublattice = sublattice.unsqueeze(-1) + ((positions.view(shape) & 1) << axis)
    return drawn[sublattice]


def sublattice_firsts(drawn: Tensor, parity: Tensor) -> list[list[list[int]]]:
    """First cells of the sublattices that fire in each step; every second cell belongs to them.

    Args:
        drawn: of `drawn_sublattices`, ``(steps, 2**spatial_dims)``.
        parity: whether the images start at an even (0) or odd (1) position, ``(spatial_dims,)``.

    Returns:
        For each step half of the sublattices, each by one number, 0 or 1, per axis.
    """
    axes = torch.arange(len(parity), device=parity.device)
    firsts = ((drawn.nonzero()[:, 1:] >> axes) & 1) ^ parity
    steps: list[list[list[int]]] = firsts.view(len(drawn), -1, len(parity)).tolist()
    return steps
