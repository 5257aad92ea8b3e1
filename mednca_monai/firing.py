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
    x = ((digest ^ word) + 0x9E3779B9) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def step_digest(seed: Tensor, level: int, step: int) -> Tensor:
    """Digest of seed (its low, then its high 32 bits), level and step, ``(B,)`` from ``(B,)``."""
    digest = absorb(torch.zeros_like(seed), seed & 0xFFFFFFFF)
    digest = absorb(digest, (seed >> 32) & 0xFFFFFFFF)
    digest = absorb(digest, torch.full_like(seed, level))
    return absorb(digest, torch.full_like(seed, step))


def independent_fires(digest: Tensor, start: Tensor, size: list[int], threshold: int) -> Tensor:
    """Each cell fires by itself, with probability ``threshold / 2**32``.

    The step's digest absorbs the cell's absolute position, one axis after the other; the cell fires
    where the result is below the threshold.

    Args:
        digest: of `step_digest`, ``(B,)``.
        start: absolute position of the first cell, ``(1, spatial_dims)`` or ``(B, spatial_dims)``.
        size: number of cells along each axis.
        threshold: from 0 (no cell fires) to 2**32 (all do).

    Returns:
        Booleans ``(B, 1, *size)``.
    """
    digest = digest.unsqueeze(1)
    for axis, length in enumerate(size):
        position = start[:, axis : axis + 1] + torch.arange(length, device=start.device)
        shape = [position.shape[0]] + [1] * (axis + 1) + [length]
        digest = absorb(digest.unsqueeze(-1), position.view(shape))
    return digest < threshold


def sublattice_fires(digest: Tensor, start: Tensor, size: list[int]) -> Tensor:
    """Half of the 2**d sublattices of even and odd positions fire, the same ones in a whole batch.

    A cell at odd positions along some axes belongs to the sublattice whose number has these bits
    set (axis 0 is bit 0). The digest of the batch's first item absorbs each sublattice's number,
    and the half with the smallest results fires.

    Args:
        digest: of `step_digest`, ``(B,)``.
        start: absolute position of the first cell, ``(1, spatial_dims)`` or ``(B, spatial_dims)``.
        size: number of cells along each axis.

    Returns:
        Booleans ``(1, 1, *size)`` or ``(B, 1, *size)``.
    """
    draws = absorb(digest[:1], torch.arange(1 << len(size), device=digest.device))
    fires = (draws.unsqueeze(1) > draws).sum(1) < len(draws) // 2
    sublattice = torch.zeros([start.shape[0], 1], dtype=torch.int64, device=start.device)
    for axis, length in enumerate(size):
        position = start[:, axis : axis + 1] + torch.arange(length, device=start.device)
        shape = [position.shape[0]] + [1] * (axis + 1) + [length]
        sublattice = sublattice.unsqueeze(-1) + ((position.view(shape) & 1) << axis)
    return fires[sublattice]
