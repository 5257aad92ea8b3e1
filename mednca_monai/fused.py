"""All steps of an automaton by `mednca_monai.kernels`; only imported where there is a GPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from mednca_monai.kernels import (
    advance_kernel,
    probe_kernel,
    retreat_kernel,
    retreat_to_perception_kernel,
    retreat_to_states_kernel,
)

PROGRAMS = 32  # that share a sum over all cells
# Cells of a program and how it is compiled, the fastest of some on an H100. Products of 64 rows or
# more are of two warps: by four, Hopper takes wgmma instructions, which Triton 3.6 gets wrong here
# (as 3.7 in https://github.com/triton-lang/triton/issues/11366).
ADVANCE = {"block": 64, "num_warps": 2, "num_stages": 3}
RETREAT = {"block": 32, "num_warps": 2, "num_stages": 2}
RETREAT_TO_PERCEPTION = {"block": 128, "num_warps": 4, "num_stages": 2}
RETREAT_TO_STATES = {"block": 64, "num_warps": 2, "num_stages": 1}


class Steps(NamedTuple):
    """What the kernels need to know of an automaton and a batch beside weights and states.

    Attributes:
        draws: for each step, of `row_digests` or, for sublattices, of `drawn_sublattices`.
        start: absolute position of the first cell, int64, ``(B, spatial_dims)``.
        threshold: of `independent_fires`.
        radius: of a neighbourhood.
        segment_steps: training keeps the states before every so many steps.
        dtype: of the products.
    """

    draws: Tensor
    start: Tensor
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
        size = states.shape[1:-1]
        return [states[..., 0].numel(), *([1] if len(size) == 2 else []), *size]

    def sizes(self, states: Tensor, weights: list[Tensor]) -> dict[str, int]:
        """What all kernels are compiled for."""
        taps, padded, around = weights[0].shape
        return {
            "dims": states.dim() - 2,
            "radius": self.radius,
            "taps": taps,
            "channels": states.shape[-1],
            "padded": padded,
            "around": around,
        }

    def layers(self, weights: list[Tensor]) -> dict[str, int]:
        """What the kernels with dense layers are compiled for beside `sizes`."""
        return {"hidden_size": len(weights[2]), "sublattices": self.draws.dtype == torch.bool}

    def advance(self, states: Tensor, after: Tensor, step: int, weights: list[Tensor]) -> None:
        """Take a step from ``states`` to ``after``, both ``(B, *spatial, C)``."""
        count, *axes = self.grid(states)
        advance_kernel[(triton.cdiv(count, ADVANCE["block"]),)](
            states, after, *weights, self.draws[step], self.start, self.threshold, count, *axes,
            **self.sizes(states, weights), **self.layers(weights), **ADVANCE,
        )  # fmt: skip

    def retreat(
        self, states: Tensor, upstream: Tensor, step: int, weights: list[Tensor], sums: list[Tensor]
    ) -> Tensor:
        """Gradient of the states before a step from that of those after it.

        The dense layers' gradients are rounded to ``dtype`` in each step, as under autocast.

        Args:
            states: before the step.
            upstream: gradient of those after it.
            step: number of the step.
            weights: of `packed`, by `cast`.
            sums: gradients of ``weights``, of the first in `PROGRAMS` parts, added to in place.
        """
        count, *axes = self.grid(states)
        sizes, downstream = self.sizes(states, weights), torch.empty_like(upstream)
        (taps, padded, around), size = weights[0].shape, len(weights[2])
        widths = around, padded + around, size, size, padded
        factors = [states.new_empty(count, n, dtype=self.dtype) for n in widths]
        of_around, features, of_sums, layers, changes = factors
        retreat_kernel[(triton.cdiv(count, RETREAT["block"]),)](
            states, upstream, downstream, *factors, *weights, self.draws[step], self.start,
            self.threshold, count, *axes, **sizes, **self.layers(weights), **RETREAT,
        )  # fmt: skip
        sums[1] += features.t() @ of_sums
        sums[2] += of_sums.sum(0, dtype=torch.float32)
        sums[3] += layers.t() @ changes
        retreat_to_perception_kernel[(PROGRAMS, taps)](
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
        sums = [torch.zeros_like(weight) for weight in weights]
        sums[0] = sums[0].repeat(PROGRAMS, 1, 1, 1)
        firsts = range(0, len(steps.draws), steps.segment_steps)
        for first, kept in zip(reversed(firsts), reversed(segments), strict=True):
            states = [kept]
            last = min(first + steps.segment_steps, len(steps.draws)) - 1
            for step in range(first, last):
                after = torch.empty_like(kept)
                steps.advance(states[-1], after, step, cast)
                states.append(after)
            for step in range(last, first - 1, -1):
                gradient = steps.retreat(states.pop(), gradient, step, cast, sums)
        return None, gradient, sums[0].sum(0), *sums[1:]


def filled_up(weight: Tensor, *shape: int) -> Tensor:
    """Fill up the last axes of a tensor with zeros."""
    padding: list[int] = []
    for length, whole in zip(weight.shape[::-1], shape[::-1], strict=False):
        padding += [0, whole - length]
    return nn.functional.pad(weight, padding).contiguous()


def power_of_two(n: int) -> int:
    """Smallest power of two of at least n and 16, which matrix units take."""
    return max(int(triton.next_power_of_2(n)), 16)


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
    padded, padded_around, size = (power_of_two(n) for n in (channels, around, len(bias)))
    own, other = hidden.flatten(1).t().tensor_split([channels])
    dense = [filled_up(own, padded, size), filled_up(other, padded_around, size)]
    return [
        filled_up(perception.flatten(2).permute(2, 1, 0), padded, padded_around),
        torch.cat(dense),
        filled_up(bias, size),
        filled_up(update.flatten(1).t(), size, padded),
    ]


def run(states: Tensor, rule: list[Tensor], steps: Steps) -> Tensor:
    """States ``(B, *spatial, C)`` after all steps, with gradients where they are asked for."""
    with torch.cuda.device(states.get_device()):  # where Triton starts kernels
        after: Tensor = Trajectory.apply(steps, states, *packed(rule))  # type: ignore[no-untyped-call]
    return after


def probe(number: Tensor) -> None:
    """Compile and start a kernel, which among others takes a C compiler and Python's headers."""
    with torch.cuda.device(number.get_device()):
        probe_kernel[(1,)](number)
