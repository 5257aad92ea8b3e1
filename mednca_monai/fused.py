"""All steps of an automaton on an NVIDIA GPU, each step one Triton kernel; only loaded for one.

A program of a kernel takes some cells through perception, hidden layer and update, none of which
pass through the GPU's memory; a step reads a state and writes the next. Products are of bfloat16
(or float16) under autocast, else of float32 in three of TF32; states and sums are float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PROGRAMS = 264  # that share a sum over all cells: two for each of a large GPU's multiprocessors
# cells of a program and how it is compiled, the fastest of some on an H100
ADVANCE = {"block": 128, "num_warps": 4, "num_stages": 3}
RETREAT = {"block": 64, "num_warps": 8, "num_stages": 1}
RETREAT_TO_PERCEPTION = {"block": 128, "num_warps": 4, "num_stages": 2}
RETREAT_TO_STATES = {"block": 128, "num_warps": 4, "num_stages": 2}


@triton.jit
def mirrored(position, length):  # type: ignore[no-untyped-def]
    """Cell of an axis that a position stands for, less than ``length`` beyond its ends."""
    return length - 1 - tl.abs(length - 1 - tl.abs(position))


@triton.jit
def extended(position, length, radius, way: tl.constexpr):  # type: ignore[no-untyped-def]
    """Position itself (0), or that of its mirror image before (1) or after the axis (2).

    Returns:
        The position and whether there is one.
    """
    if way == 1:
        return -position, (position >= 1) & (position <= radius)
    if way == 2:
        last = length - 1
        return 2 * last - position, (position >= last - radius) & (position < last)
    return position, position >= 0


@triton.jit
def absorb(digest, word):  # type: ignore[no-untyped-def]
    """As `mednca_monai.firing.absorb`, of unsigned 32-bit integers."""
    x = (digest ^ word.to(tl.uint32)) + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def positions(cells, depth, height, width):  # type: ignore[no-untyped-def]
    """Item and place of cells, counted through the whole batch; a 2-D image is of depth 1."""
    rows = cells // width
    planes = rows // height
    return planes // depth, planes % depth, rows % height, cells % width


@triton.jit
def fires(  # type: ignore[no-untyped-def]
    draws,
    starts,
    threshold,
    place,
    depth,
    height,
    is_inside,
    dims: tl.constexpr,
    sublattices: tl.constexpr,
):
    """Whether cells fire, as `mednca_monai.firing` has it.

    ``draws`` points to what a step has of `row_digests` or, for sublattices, `drawn_sublattices`.
    """
    item, z, y, x = place
    first = starts + item * dims
    x += tl.load(first + dims - 1, mask=is_inside, other=0)
    if sublattices:
        y += tl.load(first + dims - 2, mask=is_inside, other=0)
        number = (y & 1) + 2 * (x & 1)
        if dims == 3:
            z += tl.load(first, mask=is_inside, other=0)
            number = (z & 1) + 2 * number
        return tl.load(draws + number, mask=is_inside, other=0) != 0
    if dims == 3:
        digest = tl.load(draws + item * depth + z, mask=is_inside, other=0).to(tl.uint32)
        digest = absorb(digest, y + tl.load(first + 1, mask=is_inside, other=0))
    else:
        digest = tl.load(draws + item * height + y, mask=is_inside, other=0).to(tl.uint32)
    return absorb(digest, x).to(tl.int64) < threshold


@triton.jit
def neighbours(place, tap, depth, height, width, dims: tl.constexpr, radius: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cells that lie at place ``tap`` of the neighbourhood, beyond the border mirrored."""
    item, z, y, x = place
    side: tl.constexpr = 2 * radius + 1
    x = mirrored(x + tap % side - radius, width)
    y = mirrored(y + tap // side % side - radius, height)
    if dims == 3:
        z = mirrored(z + tap // (side * side) - radius, depth)
    return ((item * depth + z) * height + y) * width + x


@triton.jit
def load(states, cells, is_inside, channels: tl.constexpr, padded: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of cells, ``(N, channels)``, filled up with zeros to ``(N, padded)``."""
    channel = tl.arange(0, padded)[None, :]
    places = states + cells.to(tl.int64)[:, None] * channels + channel
    return tl.load(places, mask=is_inside[:, None] & (channel < channels), other=0.0)


@triton.jit
def matrix(weights, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Matrix ``(rows, columns)`` in memory."""
    return tl.load(weights + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])


@triton.jit
def add_to(sums, change, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add to a matrix in memory."""
    places = sums + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(places, tl.load(places) + change)


@triton.jit
def perceive(  # type: ignore[no-untyped-def]
    states,
    perception,
    hidden,
    bias,
    place,
    depth,
    height,
    width,
    is_inside,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """State of cells, what they perceive, in the products' dtype, and the hidden layer's sums."""
    dtype: tl.constexpr = perception.dtype.element_ty
    perceived = tl.zeros([block, around], tl.float32)
    for tap in range(taps):
        cells = neighbours(place, tap, depth, height, width, dims, radius)
        state = load(states, cells, is_inside, channels, padded).to(dtype)
        weight = matrix(perception + tap * padded * around, padded, around)
        perceived = tl.dot(state, weight, perceived, input_precision="tf32x3")
    perceived = perceived.to(dtype)
    cells = neighbours(place, taps // 2, depth, height, width, dims, radius)
    state = load(states, cells, is_inside, channels, padded)
    sums = tl.zeros([block, size], tl.float32) + tl.load(bias + tl.arange(0, size))[None, :]
    own = matrix(hidden, padded, size)
    sums = tl.dot(state.to(dtype), own, sums, input_precision="tf32x3")
    other = matrix(hidden + padded * size, around, size)
    sums = tl.dot(perceived, other, sums, input_precision="tf32x3")
    return state, perceived, sums


@triton.jit
def advance_kernel(  # type: ignore[no-untyped-def]
    states,
    after,
    perception,
    hidden,
    bias,
    update,
    draws,
    starts,
    threshold,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    size: tl.constexpr,
    sublattices: tl.constexpr,
    block: tl.constexpr,
):
    """States after a step."""
    cells = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = cells < count
    place = positions(cells, depth, height, width)
    state, _, sums = perceive(
        states, perception, hidden, bias, place, depth, height, width, is_inside,
        dims, radius, taps, channels, padded, around, size, block,
    )  # fmt: skip
    layer = tl.maximum(sums, 0.0).to(perception.dtype.element_ty)
    change = tl.dot(layer, matrix(update, size, padded), input_precision="tf32x3")
    fire = fires(draws, starts, threshold, place, depth, height, is_inside, dims, sublattices)
    channel = tl.arange(0, padded)[None, :]
    places = after + cells.to(tl.int64)[:, None] * channels + channel
    state = tl.where(fire[:, None], state + change, state)
    tl.store(places, state, mask=is_inside[:, None] & (channel < channels))


@triton.jit
def retreat_kernel(  # type: ignore[no-untyped-def]
    states,
    upstream,
    downstream,
    of_around,
    of_hidden,
    of_bias,
    of_update,
    perception,
    hidden,
    bias,
    update,
    draws,
    starts,
    threshold,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    size: tl.constexpr,
    sublattices: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of a step's dense layers, of what cells perceive and, past it, of their states."""
    dtype: tl.constexpr = perception.dtype.element_ty
    program = tl.program_id(0)
    channel = tl.arange(0, padded)[None, :]
    sum_own = tl.zeros([padded, size], tl.float32)
    sum_around = tl.zeros([around, size], tl.float32)
    sum_update = tl.zeros([size, padded], tl.float32)
    sum_bias = tl.zeros([size], tl.float32)
    for first in range(program * block, count, tl.num_programs(0) * block):
        cells = first + tl.arange(0, block)
        is_inside = cells < count
        place = positions(cells, depth, height, width)
        state, perceived, sums = perceive(
            states, perception, hidden, bias, place, depth, height, width, is_inside,
            dims, radius, taps, channels, padded, around, size, block,
        )  # fmt: skip
        fire = fires(draws, starts, threshold, place, depth, height, is_inside, dims, sublattices)
        gradient = load(upstream, cells, is_inside, channels, padded)
        change = tl.where(fire[:, None], gradient, 0.0).to(dtype)
        layer = tl.maximum(sums, 0.0).to(dtype)
        sum_update = tl.dot(tl.trans(layer), change, sum_update, input_precision="tf32x3")
        weight = tl.trans(matrix(update, size, padded))
        of_sums = tl.dot(change, weight, input_precision="tf32x3")
        of_sums = tl.where(sums > 0.0, of_sums, 0.0)
        sum_bias += tl.sum(of_sums, 0)
        of_sums = of_sums.to(dtype)
        sum_own = tl.dot(tl.trans(state.to(dtype)), of_sums, sum_own, input_precision="tf32x3")
        sum_around = tl.dot(tl.trans(perceived), of_sums, sum_around, input_precision="tf32x3")
        weight = tl.trans(matrix(hidden, padded, size))
        gradient = tl.dot(of_sums, weight, gradient, input_precision="tf32x3")
        rows = cells.to(tl.int64)[:, None]
        places = downstream + rows * channels + channel
        tl.store(places, gradient, mask=is_inside[:, None] & (channel < channels))
        weight = tl.trans(matrix(hidden + padded * size, around, size))
        of_perceived = tl.dot(of_sums, weight, input_precision="tf32x3").to(dtype)
        places = of_around + rows * around + tl.arange(0, around)[None, :]
        tl.store(places, of_perceived, mask=is_inside[:, None])
    of_hidden += program * (padded + around) * size
    add_to(of_hidden, sum_own, padded, size)
    add_to(of_hidden + padded * size, sum_around, around, size)
    add_to(of_update + program * size * padded, sum_update, size, padded)
    places = of_bias + program * size + tl.arange(0, size)
    tl.store(places, tl.load(places) + sum_bias)


@triton.jit
def retreat_to_perception_kernel(  # type: ignore[no-untyped-def]
    states,
    of_around,
    of_perception,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient of the perception's weights at one place of the neighbourhood."""
    program, tap = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = of_around.dtype.element_ty
    sums = tl.zeros([padded, around], tl.float32)
    for first in range(program * block, count, tl.num_programs(0) * block):
        cells = first + tl.arange(0, block)
        is_inside = cells < count
        gradient = load(of_around, cells, is_inside, around, around)
        place = positions(cells, depth, height, width)
        cells = neighbours(place, tap, depth, height, width, dims, radius)
        state = load(states, cells, is_inside, channels, padded).to(dtype)
        sums = tl.dot(tl.trans(state), gradient, sums, input_precision="tf32x3")
    add_to(of_perception + (program * taps + tap) * padded * around, sums, padded, around)


@triton.jit
def retreat_to_states_kernel(  # type: ignore[no-untyped-def]
    of_around,
    downstream,
    perception,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    block: tl.constexpr,
):
    """Add the gradient of the states that were perceived, by their cells and mirror images."""
    cells = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = cells < count
    item, z, y, x = positions(cells, depth, height, width)
    side: tl.constexpr = 2 * radius + 1
    sums = load(downstream, cells, is_inside, channels, padded)
    for way_z in tl.static_range(3 if dims == 3 else 1):
        for way_y in tl.static_range(3):
            for way_x in tl.static_range(3):
                z0, is_z = extended(z, depth, radius, way_z)
                y0, is_y = extended(y, height, radius, way_y)
                x0, is_x = extended(x, width, radius, way_x)
                is_any = is_inside & is_z & is_y & is_x
                if tl.max(is_any.to(tl.int32), 0) > 0:
                    for tap in range(taps):
                        x1 = x0 - tap % side + radius
                        y1 = y0 - tap // side % side + radius
                        z1 = z0
                        if dims == 3:
                            z1 = z0 - tap // (side * side) + radius
                        here = is_any & (x1 >= 0) & (x1 < width) & (y1 >= 0) & (y1 < height)
                        here = here & (z1 >= 0) & (z1 < depth)
                        source = ((item * depth + z1) * height + y1) * width + x1
                        gradient = load(of_around, source, here, around, around)
                        weight = matrix(perception + tap * padded * around, padded, around)
                        weight = tl.trans(weight)
                        sums = tl.dot(gradient, weight, sums, input_precision="tf32x3")
    channel = tl.arange(0, padded)[None, :]
    places = downstream + cells.to(tl.int64)[:, None] * channels + channel
    tl.store(places, sums, mask=is_inside[:, None] & (channel < channels))


class Steps(NamedTuple):
    """What the kernels need to know of an automaton and a batch beside weights and states.

    Attributes:
        draws: for each step, of `row_digests` or, for sublattices, of `drawn_sublattices`.
        starts: absolute position of the first cell, int64, ``(B, spatial_dims)``.
        threshold: of `independent_fires`.
        radius: of a neighbourhood.
        segment_steps: training keeps the state of every so many steps.
        dtype: of the products.
    """

    draws: Tensor
    starts: Tensor
    threshold: int
    radius: int
    segment_steps: int
    dtype: torch.dtype

    def cast(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights for products in ``dtype``, to whose sums the bias is added."""
        perception, hidden, bias, update = weights
        return [perception.to(self.dtype), hidden.to(self.dtype), bias, update.to(self.dtype)]

    def grid(self, states: Tensor) -> list[int]:
        """Number of cells and their axes, a 2-D image of depth 1."""
        batch, *size, _ = states.shape
        return [states[..., 0].numel(), *([1] if len(size) == 2 else []), *size]

    def sizes(self, states: Tensor, weights: list[Tensor]) -> dict[str, int]:
        """What the kernels are compiled for."""
        taps, padded, around = weights[0].shape
        return {
            "dims": states.dim() - 2,
            "radius": self.radius,
            "taps": taps,
            "channels": states.shape[-1],
            "padded": padded,
            "around": around,
        }

    def rule(self, weights: list[Tensor]) -> dict[str, int]:
        """What the kernels with dense layers are compiled for beside `sizes`."""
        return {"size": weights[2].shape[0], "sublattices": self.draws.dtype == torch.bool}

    def advance(self, states: Tensor, after: Tensor, step: int, weights: list[Tensor]) -> None:
        """Take a step from ``states`` to ``after``, both ``(B, *spatial, C)``."""
        count, *axes = self.grid(states)
        advance_kernel[(triton.cdiv(count, ADVANCE["block"]),)](
            states, after, *weights, self.draws[step], self.starts, self.threshold, count, *axes,
            **self.sizes(states, weights), **self.rule(weights), **ADVANCE,
        )  # fmt: skip

    def retreat(
        self, states: Tensor, upstream: Tensor, step: int, weights: list[Tensor], sums: list[Tensor]
    ) -> Tensor:
        """Gradient of the states before a step from that of those after it.

        Args:
            states: before the step.
            upstream: gradient of those after it.
            step: number of the step.
            weights: of `packed`.
            sums: gradients of ``weights``, several parts of each, added to in place.
        """
        count, *axes = self.grid(states)
        sizes, downstream = self.sizes(states, weights), torch.empty_like(upstream)
        of_around = states.new_empty(count, sizes["around"], dtype=self.dtype)
        retreat_kernel[(PROGRAMS,)](
            states, upstream, downstream, of_around, *sums[1:], *weights, self.draws[step],
            self.starts, self.threshold, count, *axes, **sizes, **self.rule(weights), **RETREAT,
        )  # fmt: skip
        retreat_to_perception_kernel[(len(sums[0]), sizes["taps"])](
            states, of_around, sums[0], count, *axes, **sizes, **RETREAT_TO_PERCEPTION
        )
        retreat_to_states_kernel[(triton.cdiv(count, RETREAT_TO_STATES["block"]),)](
            of_around, downstream, weights[0], count, *axes, **sizes, **RETREAT_TO_STATES
        )
        return downstream


class Trajectory(torch.autograd.Function):
    """All steps of an automaton; the backward pass computes hidden layers again.

    Kept are the states before every ``segment_steps``-th step.
    """

    @staticmethod
    def forward(ctx: Any, steps: Steps, states: Tensor, *weights: Tensor) -> Tensor:
        """States ``(B, *spatial, C)`` after all steps; the weights are those of `packed`."""
        cast, kept = steps.cast(weights), []
        after = torch.empty_like(states)
        for step in range(len(steps.draws)):
            steps.advance(states, after, step, cast)
            if any(ctx.needs_input_grad) and step % steps.segment_steps == 0:
                kept.append(states)
                states, after = after, torch.empty_like(states)
            else:
                states, after = after, states
        ctx.steps = steps
        ctx.save_for_backward(*weights, *kept)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of states and weights."""
        steps: Steps = ctx.steps
        weights, segments = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        cast, gradient = steps.cast(weights), gradient.contiguous()
        sums = [weight.new_zeros(PROGRAMS, *weight.shape) for weight in weights]
        starts = range(0, len(steps.draws), steps.segment_steps)
        for start, kept in zip(reversed(starts), reversed(segments), strict=True):
            states = [kept]
            last = min(start + steps.segment_steps, len(steps.draws)) - 1
            for step in range(start, last):
                after = torch.empty_like(kept)
                steps.advance(states[-1], after, step, cast)
                states.append(after)
            for step in range(last, start - 1, -1):
                gradient = steps.retreat(states.pop(), gradient, step, cast, sums)
        return None, gradient, *(total.sum(0) for total in sums)


def filled_up(weight: Tensor, *shape: int) -> Tensor:
    """Fill up the last axes of a tensor with zeros."""
    padding: list[int] = []
    for length, whole in zip(weight.shape[::-1], shape[::-1], strict=False):
        padding += [0, whole - length]
    return nn.functional.pad(weight, padding).contiguous()


def width(n: int) -> int:
    """Smallest power of two of at least n and 16, which matrix units take."""
    return max(triton.next_power_of_2(n), 16)


def packed(rule: list[Tensor]) -> list[Tensor]:
    """Weights of a step as the kernels read them, filled up with zeros.

    Args:
        rule: of `CellularAutomaton.rule`, of two products.

    Returns:
        Perception, ``(taps, channels, around)``; dense layers, ``(channels + around, size)``, its
        bias, ``(size,)``, and ``(size, channels)``.
    """
    bias, update, perception, hidden = rule
    around, channels = perception.shape[:2]
    padded, padded_around, size = width(channels), width(around), width(len(bias))
    own, other = hidden.flatten(1).t().split([channels, around])
    dense = [filled_up(own, padded, size), filled_up(other, padded_around, size)]
    return [
        filled_up(perception.flatten(2).permute(2, 1, 0), padded, padded_around),
        torch.cat(dense),
        filled_up(bias, size),
        filled_up(update.flatten(1).t(), size, padded),
    ]


def run(states: Tensor, rule: list[Tensor], steps: Steps) -> Tensor:
    """States ``(B, C, *spatial)`` after all steps, with gradients where they are asked for."""
    rows = states.movedim(1, -1).contiguous()
    after: Tensor = Trajectory.apply(steps, rows, *packed(rule))  # type: ignore[no-untyped-call]
    return after.movedim(-1, 1)
