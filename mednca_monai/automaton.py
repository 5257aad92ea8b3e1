"""The cell automaton of one level: cells perceive their neighbourhood, firing cells update."""

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_norm_layer
from monai.utils.module import pytorch_after
from torch import Tensor, nn

from mednca_monai.convolution import (
    as_rows,
    channels_last,
    dense_convolution,
    dense_layer,
    depthwise_convolution,
    exact_convolution,
    gathered_cells,
    gathered_convolution,
    is_fast_in_onednn,
    is_traced,
)
from mednca_monai.firing import (
    drawn_sublattices,
    independent_fires,
    row_digests,
    step_digests,
    sublattice_fires,
    sublattice_firsts,
)
from mednca_monai.grid import (
    Block,
    Coarse,
    blocks,
    enlarge,
    interior,
    lattice,
    part,
    reflect,
    reflect_pad,
    unreflect,
)

# glibc gives memory back to the system by the size of the largest block that was ever freed; after
# this one (31 MiB, never touched) a step's temporaries are reused, not mapped again each time
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
HIDDEN = 2**19  # numbers in a hidden layer at a time: near a processor's cache, few calls
HIDDEN_ON_GPU = 2**25
# up to which operations of one product, as a part of those of two, it takes no longer
FOLD_GATHERED, FOLD = 1.0, 1.5
HAS_AMX = torch.cpu._is_amx_tile_supported()  # asked once, as compilers refuse to trace it


class Firing(NamedTuple):
    """Which cells fire in a forward pass.

    Attributes:
        rows: of `row_digests`, where each cell fires by itself.
        drawn: of `drawn_sublattices`, where sublattices do.
        start: absolute position of the first cell, int64, ``(B, spatial_dims)``.
        firsts: for each step the first cells of the sublattices that fire, as they lie in these
            images; empty where masks say which cells fire.
    """

    rows: Tensor
    drawn: Tensor
    start: Tensor
    firsts: list[list[list[int]]]


class Change(NamedTuple):
    """What a step adds to the cells of a window.

    Attributes:
        values: ``(B, num_channels, *spatial)``, or of some cells only, ``(N, num_channels)``.
        positions: where these lie, flat in ``(B, *padded)``, int64; ``None`` if they are all.
    """

    values: Tensor
    positions: Tensor | None


class CellularAutomaton(nn.Module):
    """A learnt rule that every cell of a grid follows, over and over.

    A cell is ``num_channels`` numbers: the image's channels, which never change, then its own. In a
    step it perceives (its state and learnt convolutions of the state around it), and the cells that
    fire add to their own channels what two dense layers make of that perception. The last layer
    starts at zero, so a new automaton changes nothing.

    A step works in place, one cache-sized block of cells after the other and, where that pays, on
    the firing cells only; on an NVIDIA GPU under autocast it is one kernel. Batch norm without
    running statistics becomes part of the rule, once a first pass over the blocks has found mean
    and variance; other norms, and any in 16 bits or on a GPU, take all cells at once. Training
    keeps the cells that each segment of ``segment_steps`` steps overwrites, as they were. The
    backward pass puts them back and computes hidden layers, and all steps of a segment but its
    last, again; it cannot itself be differentiated. Hooks of the layers are not called, but those
    of a norm that takes all cells at once.

    Reference:
        Kalkhof, J., González, C., Mukhopadhyay, A., "Med-NCA: Robust and Lightweight Segmentation
        with Neural Cellular Automata", IPMI 2023, https://arxiv.org/abs/2302.03473 (dense).
        Kalkhof, J., Mukhopadhyay, A., "M3D-NCA: Robust 3D Segmentation with Built-In Quality
        Control", MICCAI 2023, https://arxiv.org/abs/2309.02954 (depthwise, with batch norm).

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels, the first of the state.
        num_channels: all channels of a cell.
        hidden_size: width of the rule's hidden layer.
        level: number of this automaton in the network, from coarse to fine; the fire masks know it.
        steps: how often the rule is applied.
        fire_rate: probability in [2**-32, 1] that a cell is updated in a step.
        firing: ``"independent"`` or ``"sublattices"``, see `mednca_monai.firing`.
        kernel_size: odd width of the perceived neighbourhood, in cells.
        perception: ``"dense"`` (two dense convolutions) or ``"depthwise"`` (one depthwise).
        norm: MONAI name or (name, arguments) of the hidden layer's normalisation, or ``None``.
        segment_steps: length of the segments of steps that training goes back by, at least 1.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_channels: int,
        hidden_size: int,
        *,
        level: int,
        steps: int,
        fire_rate: float,
        firing: str,
        kernel_size: int,
        perception: str,
        norm: str | tuple[str, dict[str, object]] | None,
        segment_steps: int,
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_channels = num_channels
        self.level = level
        self.steps = steps
        self.segment_steps = segment_steps
        self.threshold = round(float(fire_rate) * 2**32)
        self.firing = firing
        self.radius = kernel_size // 2
        self.is_dense = perception == "dense"
        self.is_normed = norm is not None
        apart = kernel_size**spatial_dims * 2 * num_channels + 3 * hidden_size
        cost = kernel_size**spatial_dims * hidden_size / apart
        self.folds_gathered = self.is_dense and cost <= FOLD_GATHERED
        self.folds_all = self.is_dense and cost <= FOLD
        # sublattices are strided convolutions, without masks
        self.is_strided = self.is_dense and norm is None and firing == "sublattices"
        # one of so many cells of a block is computed at a time, at a fire rate of one half
        at_once = 2**spatial_dims if self.is_strided else 2
        if self.is_normed:
            at_once = 8  # each block is computed twice, but up to one all cells at once
        self.block_cells = at_once * max(HIDDEN // hidden_size, 1)
        self.block_cells_on_gpu = at_once * max(HIDDEN_ON_GPU // hidden_size, 1)
        convolution = Conv[Conv.CONV, spatial_dims]
        around = 2 * num_channels if self.is_dense else num_channels
        groups = 1 if self.is_dense else num_channels
        self.perception = convolution(num_channels, around, kernel_size, groups=groups)
        self.hidden = convolution(num_channels + around, hidden_size, 1)
        try:
            self.norm: nn.Module = nn.Identity()
            if norm is not None:
                self.norm = get_norm_layer(norm, spatial_dims, hidden_size)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`norm` must be a MONAI normalisation, got {norm!r}: {error}"
            ) from error
        self.update = convolution(hidden_size, num_channels, 1, bias=False)
        nn.init.zeros_(self.update.weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
        """Convolve ``(B, C, *spatial)`` without padding, in 2-D or 3-D."""
        is_single = weight[0, 0].numel() == 1
        if is_single and stride > 1:  # the gradients of PyTorch's own write beyond their memory
            x, stride = lattice(x, [0] * self.spatial_dims, stride), 1
        if is_single and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # a product, as oneDNN's gradients of such convolutions are wrong for some sizes
            rows = nn.functional.linear(x.movedim(1, -1), weight.flatten(1), bias)
            return rows.movedim(-1, 1)
        if self.is_exact(x):
            return exact_convolution(x, weight, bias, stride)
        return dense_convolution(x, weight, bias, stride)

    def is_exact(self, x: Tensor) -> bool:
        """Whether a GPU is to compute in full float32, as other devices do."""
        return x.device.type == "cuda" and not self.training and not is_traced()

    def folds(self, x: Tensor) -> bool:
        """Whether perception and hidden layer, both linear, are one product: where that is faster.

        A GPU's kernel always takes two.
        """
        gathers = self.gathers(x) and not self.is_normed
        folds = self.folds_gathered if gathers else self.folds_all
        return folds and not self.fuses(x)

    def rule(self, folds: bool) -> list[Tensor]:
        """Weights of a step, the perception's bias in that of the hidden layer.

        Args:
            folds: whether perception and hidden layer are one product.

        Returns:
            Bias, ``(hidden_size,)``, the hidden layer of a zero state; from the hidden layer to the
            change, ``(num_channels, hidden_size, *ones)``, which is zero for image channels;
            perception, ``(around, num_channels or 1, *kernel)``; from a cell and its perception to
            the hidden layer, ``(hidden_size, num_channels + around, *ones)``. Or instead of the
            last two, from the neighbourhood to the hidden layer, ``(hidden_size, num_channels,
            *kernel)``.
        """
        weight = self.hidden.weight
        perceived = self.perception.bias
        assert perceived is not None  # for TorchScript
        zero = nn.functional.pad(perceived, [self.num_channels, 0]).unsqueeze(0)
        bias = nn.functional.linear(zero, weight.flatten(1), self.hidden.bias)
        bias = bias.flatten().to(weight.dtype)  # autocast or not
        no_image = [0, 0] * (1 + self.spatial_dims) + [self.in_channels, 0]
        update = nn.functional.pad(self.update.weight[self.in_channels :], no_image)
        if not folds:
            return [bias, update, channels_last(self.perception.weight), weight]
        own, around = weight.tensor_split([self.num_channels], 1)
        kernel = torch.einsum("hp...,pc...->hc...", around, self.perception.weight)
        kernel = kernel + nn.functional.pad(own, [self.radius] * (2 * self.spatial_dims))
        return [bias, update, channels_last(kernel)]

    def perceive(self, window: Tensor, kernel: Tensor, stride: int) -> Tensor:
        """Convolve a window by the rule's kernel, for all of its cells."""
        if self.is_dense:
            return self.convolve(window, kernel, None, stride)
        if self.is_exact(window):
            return exact_convolution(window, kernel, None, groups=self.num_channels)
        return depthwise_convolution(window, kernel)

    def change(
        self,
        window: Tensor,
        rule: list[Tensor],
        fires: Tensor,
        stride: int,
        room: Tensor | None,
    ) -> Change:
        """What a step adds to the cells of a window; image channels get zeros.

        Args:
            window: states, ``(B, num_channels, *padded)``, with the radius on each side.
            rule: of `CellularAutomaton.rule`.
            fires: which cells fire, ``(B, 1, *spatial)``; empty if all of them.
            stride: the window's cells are every second one (2) or all (1).
            room: of `CellularAutomaton.room`; without it all cells are computed and normalised.
        """
        window = channels_last(autocast(window))
        if room is not None and self.gathers(window):
            return self.change_of_cells(window, rule, fires, room)
        x = self.hidden_layer(window, rule, stride)
        if room is None:
            x = self.norm(x)
        change = self.convolve(rectified(x), rule[1], None)
        if fires.numel() > 0:
            change = change * fires.to(change.dtype)  # booleans are slow factors of bfloat16
        return Change(change, None)

    def hidden_layer(self, window: Tensor, rule: list[Tensor], stride: int) -> Tensor:
        """All cells' hidden layer by a rule, before ReLU, ``(B, hidden_size, *spatial)``."""
        kernel = autocast(rule[2])
        if len(rule) == 3:
            return self.convolve(window, kernel, rule[0], stride)
        around = self.perceive(window, kernel, stride)
        cells = lattice(interior(window, self.radius), [0] * self.spatial_dims, stride)
        return self.convolve(channels_last(torch.cat([cells, around], 1)), rule[3], rule[0])

    def change_of_cells(
        self, window: Tensor, rule: list[Tensor], fires: Tensor, room: Tensor
    ) -> Change:
        """As `change`, dense layers for the firing cells only."""
        kernel = autocast(rule[2])
        positions = self.positions(fires)
        count, rows = len(positions), self.usual_rows(fires.numel())
        filled = fill_up(positions, rows)
        if self.is_dense and not self.perceives_all(window):
            x = gathered_convolution(window, kernel, filled, count, room)
        else:
            x = as_rows(self.perceive(window, kernel, 1))
            x = gathered_cells(x, fill_up(fires.flatten().nonzero().flatten(), rows), count)
        if len(rule) == 3:
            x = x + rule[0].to(x.dtype)
        else:
            x = torch.cat([gathered_cells(as_rows(window), filled, count), x], 1)
            x = dense_layer(x, rule[3].flatten(1), rule[0])
        return Change(dense_layer(rectified(x), rule[1].flatten(1), None)[:count], positions)

    def usual_rows(self, cells: int) -> int:
        """A multiple of 64 that hardly ever more of some cells fire than, if each fires by itself.

        It is four standard deviations above the mean. Items that share a seed may exceed it.
        """
        rate = self.threshold / 2**32
        count = cells * rate + 4 * math.sqrt(cells * rate * (1 - rate))
        return math.ceil(count / 64) * 64

    def positions(self, fires: Tensor) -> Tensor:
        """Where ``(B, 1, *spatial)`` is true, as flat positions in ``(B, *padded)``."""
        border = [self.radius] * (2 * self.spatial_dims)
        return nn.functional.pad(fires, border).flatten().nonzero().flatten()

    def gathers(self, x: Tensor) -> bool:
        """Whether to gather the firing cells, which a GPU would not like."""
        slow = self.spatial_dims == 3 and self.is_dense and not self.perceives_all(x)
        pays = slow or self.threshold < 0.75 * 2**32
        on_cpu = x.device.type == "cpu" and not is_traced()
        return pays and on_cpu and not self.is_strided

    def folds_norm(self, x: Tensor) -> bool:
        """Whether a rule takes in its normalisation: batch norm without running statistics.

        Once mean and variance are known, it is linear, as the hidden layer is. In 16 bits it would
        lose too much where the mean is far above the standard deviation, and a GPU has the memory.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return False
        norm, dtype = self.norm, autocast(x[:0]).dtype
        is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d) and norm.running_mean is None
        return is_batch_norm and x.device.type == "cpu" and torch.finfo(dtype).bits >= 32

    def is_whole(self, blocks: list[Block]) -> bool:
        """Whether a step takes all cells at once, its normalisation not being part of the rule."""
        return self.is_normed and len(blocks) == 1

    def moments(self, padded: Tensor, rule: list[Tensor], blocks: list[Block]) -> list[Tensor]:
        """Mean and variance (by their number) of all cells' hidden layer, ``(hidden_size,)``.

        None where they are no part of the rule.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return []
        if not self.is_normed or self.is_whole(blocks):
            return []
        cells, mean, variance = 0, torch.zeros_like(rule[0]), torch.zeros_like(rule[0])
        for block in blocks:
            window = channels_last(part(padded, block, self.radius))
            x = self.hidden_layer(window, rule, 1)
            # `var_mean` takes over thirty times as long where channels are last
            its_mean, its_variance = torch.batch_norm_update_stats(x, None, None, 0.0)
            its_cells = x[:, 0].numel()
            cells += its_cells
            share, away = its_cells / cells, its_mean - mean
            mean += share * away
            variance += share * (its_variance - variance + (1 - share) * away.square())
        return [mean, variance]

    def normed(self, rule: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        """The rule with a hidden layer normalised by its `moments`, if any."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return rule
        if not moments:
            return rule
        norm: Any = self.norm  # a batch norm
        mean, variance = moments
        scale = (variance + norm.eps).rsqrt()
        bias = (rule[0] - mean) * scale
        if norm.weight is not None:
            scale, bias = scale * norm.weight, bias * norm.weight
        if norm.bias is not None:
            bias = bias + norm.bias
        shape = [-1] + [1] * (self.spatial_dims + 1)
        return [bias, *rule[1:-1], rule[-1] * scale.view(shape)]

    def fuses(self, x: Tensor) -> bool:
        """Whether a GPU's kernels take whole steps: in 16 bits, rules that fit into registers."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return False
        if is_traced() or x.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return False
        return (
            torch.get_autocast_dtype("cuda") in (torch.float16, torch.bfloat16)
            and x.dtype == self.hidden.weight.dtype == torch.float32
            and self.is_dense
            and not self.is_normed
            and self.num_channels <= 32
            and self.perception.weight[0, 0].numel() <= 128
            and self.hidden.weight.shape[0] <= 128
            and min(x.shape[2:]) > self.radius
            and has_kernels(x.device)
        )

    def perceives_all(self, x: Tensor) -> bool:
        """Whether dense perception of all cells takes no longer than that of the firing ones."""
        if has_matrix_units(x.dtype):
            return True
        fast = x.dtype == torch.bfloat16 or is_fast_in_onednn(x, self.hidden.weight)
        return self.spatial_dims == 3 and fast and self.threshold >= 0.5 * 2**32

    def fires(self, firing: Firing, step: int, block: Block, size: list[int]) -> Tensor:
        """Cells of a block that fire in a step, ``(B, 1, *size)``."""
        start = firing.start.narrow(0, block.item, block.items)
        if self.firing == "sublattices":
            return sublattice_fires(firing.drawn[step], start, size)  # blocks start at even rows
        rows = firing.rows[step].narrow(0, block.item, block.items)
        rows = rows.narrow(1, block.row, block.rows)
        return independent_fires(rows, start[:, 1:], size[1:], self.threshold)

    def mask(self, firing: Firing, step: int, block: Block, size: list[int]) -> Tensor:
        """As `fires`; empty where strided convolutions compute no others."""
        if len(firing.firsts) > 0:
            return torch.empty(0, device=firing.start.device)
        return self.fires(firing, step, block, size)

    def lattices(self, firing: Firing, step: int) -> tuple[list[list[int]], int]:
        """First cells of the lattices that are computed in a step, and their stride."""
        if len(firing.firsts) > 0:
            return firing.firsts[step], 2
        return [[0] * self.spatial_dims], 1

    def blocks(self, state: Tensor) -> list[Block]:
        """Blocks of a batch whose hidden layer stays in the cache; all as one for some norms."""
        cells = self.block_cells if state.device.type == "cpu" else self.block_cells_on_gpu
        if self.is_normed and not self.folds_norm(state):
            cells = state.numel()
        return blocks(list(state.shape), self.radius, cells)

    def own(self, padded: Tensor) -> Tensor:
        """View of the cells' own channels of a padded state."""
        return interior(padded, self.radius)[:, self.in_channels :]

    def pad(self, image: Tensor) -> Tensor:
        """State of an image, its border and other channels undefined, channels last in memory."""
        batch, size = image.shape[0], [n + 2 * self.radius for n in image.shape[2:]]
        shape = [batch] + size + [self.num_channels]  # noqa: RUF005 (TorchScript)
        rows = torch.empty(shape, dtype=image.dtype, device=image.device)
        padded = rows.movedim(-1, 1)
        interior(padded, self.radius)[:, : self.in_channels].copy_(image)
        return padded

    def room(self, image: Tensor, room: Tensor) -> Tensor:
        """Memory for the neighbourhoods of a block's firing cells, for one block after another.

        Freed and taken anew, such large parts would not fit into the same gaps again.

        Args:
            image: that of the finest level, or of this one, ``(B, in_channels, *spatial)``.
            room: that of the level before, which serves this one as well if it is large enough.

        Returns:
            ``(n,)``, of the type that operations take under autocast; empty where none is needed.
        """
        empty = autocast(image.new_empty([0]))
        if not self.is_dense or not self.gathers(empty) or self.perceives_all(empty):
            return empty
        if self.is_whole(self.blocks(image)):
            return empty
        line = 1  # cells along all axes but the first
        for length in image.shape[3:]:
            line *= length
        cells = max(self.block_cells, (self.radius + 2) * line)  # no block has more, nor than all
        rows = self.usual_rows(min(cells, image.shape[0] * image.shape[2] * line)) * 9 // 8
        size = rows * self.perception.weight[0].numel()
        return room if len(room) >= size else empty.new_empty([size])

    def advance(
        self,
        padded: Tensor,
        firing: Firing,
        step: int,
        rule: list[Tensor],
        blocks: list[Block],
        room: Tensor,
    ) -> None:
        """Take one step in place, by the rule of this step (`normed`).

        A block is updated once the next one, which sees its last rows, has been computed.
        """
        gathered: Tensor | None = None if self.is_whole(blocks) else room
        firsts, stride = self.lattices(firing, step)
        waiting: list[tuple[Tensor, Change]] = []
        for block in blocks:
            around = part(padded, block, self.radius)
            inside = interior(around, self.radius)
            fires = self.mask(firing, step, block, list(inside.shape[2:]))
            changes: list[tuple[Tensor, Change]] = []
            for first in firsts:
                target = lattice(inside, first, stride)
                if target.numel() > 0:
                    change = self.change(lattice(around, first, 1), rule, fires, stride, gathered)
                    if change.positions is not None:
                        target = around.movedim(1, -1).view(-1, self.num_channels)
                    changes.append((target, change))
            for target, change in waiting:
                add(change, target)
            waiting = changes
        for target, change in waiting:
            add(change, target)
        reflect(padded, self.radius)

    def run(
        self, image: Tensor, coarse: Coarse, firing: Firing, rule: list[Tensor], room: Tensor
    ) -> Tensor:
        """All steps in place, without gradients; ``(B, num_channels - in_channels, *spatial)``."""
        with torch.no_grad():
            padded = self.pad(image)
            own = self.own(padded)
            blocks = self.blocks(own)
            for block in blocks:  # never all of the enlarged cells beside the state
                part(own, block, 0).copy_(enlarge(coarse, block, list(image.shape[2:])))
            reflect(padded, self.radius)
            for step in range(self.steps):
                normed = self.normed(rule, self.moments(padded, rule, blocks))
                self.advance(padded, firing, step, normed, blocks, room)
        return own

    def unroll(self, image: Tensor, coarse: Coarse, firing: Firing, rule: list[Tensor]) -> Tensor:
        """All steps as a plain graph, for compilers, exporters and their gradients."""
        whole = Block(0, image.shape[0], 0, image.shape[2])
        state = torch.cat([image, enlarge(coarse, whole, list(image.shape[2:]))], 1)
        for step in range(self.steps):
            fires = self.fires(firing, step, whole, list(state.shape[2:]))
            window = reflect_pad(state, self.radius)
            state = state + self.change(window, rule, fires, 1, None).values
        return state[:, self.in_channels :]

    def forward(
        self, image: Tensor, coarse: Coarse, seed: Tensor, start: Tensor, room: Tensor
    ) -> Tensor:
        """Apply the rule ``steps`` times.

        Args:
            image: ``(B, in_channels, *spatial)``.
            coarse: the cells' own channels, ``(B, num_channels - in_channels, *coarse spatial)``.
            seed: int64, ``(1,)`` or ``(B,)``.
            start: absolute position of the first cell, int64, ``(1, spatial_dims)`` or
                ``(B, spatial_dims)``.
            room: of `CellularAutomaton.room`.

        Returns:
            The cells' own channels afterwards.
        """
        rule = self.rule(self.folds(image))
        start = start.expand(image.shape[0], -1).contiguous()
        digests = step_digests(seed.expand(image.shape[0]), self.level, self.steps)
        drawn = drawn_sublattices(digests[:, 0], self.spatial_dims)
        masks = Firing(row_digests(digests, start[:, 0], image.shape[2]), drawn, start, [])
        scripting = torch.jit.is_scripting()  # type: ignore[attr-defined]
        if is_traced() or (scripting and torch.is_grad_enabled()):
            return self.unroll(image, coarse, masks, rule)
        if self.fuses(image):
            return self.run_fused(image, coarse, masks, rule)
        if not self.is_strided:
            return self.roll(image, coarse, masks, rule, room)
        # items that start at even and at odd positions have their sublattices in other places
        parities = start & 1
        parts: list[Tensor] = []
        places: list[Tensor] = []
        for parity in torch.unique(parities, dim=0):
            here = (parities == parity).all(1).nonzero().flatten()
            firing = Firing(
                masks.rows[:, here], drawn, start[here], sublattice_firsts(drawn, parity)
            )
            if len(here) == len(start):
                return self.roll(image, coarse, firing, rule, room)
            starts = [coarse.starts[int(item) % len(coarse.starts)] for item in here]
            some = Coarse(coarse.cells[here], coarse.scale_factor, starts)
            parts.append(self.roll(image[here], some, firing, rule, room))
            places.append(here)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def roll(
        self, image: Tensor, coarse: Coarse, firing: Firing, rule: list[Tensor], room: Tensor
    ) -> Tensor:
        """All steps in place, with gradients where they are asked for."""
        if torch.jit.is_scripting() or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self.run(image, coarse, firing, rule, room)
        return self.run_with_gradients(image, coarse, firing, rule, room)

    @torch.jit.unused
    def run_fused(
        self, image: Tensor, coarse: Coarse, firing: Firing, rule: list[Tensor]
    ) -> Tensor:
        """All steps by the kernels of a GPU."""
        from mednca_monai import fused  # Triton may be missing elsewhere

        dtype = torch.get_autocast_dtype(image.device.type)
        draws = firing.drawn if self.firing == "sublattices" else firing.rows
        steps = fused.Steps(
            draws, firing.start, self.threshold, self.radius, self.segment_steps, dtype
        )
        size = list(image.shape[2:])
        cells = enlarge(coarse, Block(0, image.shape[0], 0, size[0]), size)
        states = torch.cat([image.movedim(1, -1), cells.movedim(1, -1)], -1).contiguous()
        del cells
        return fused.run(states, rule, steps)[..., self.in_channels :].movedim(-1, 1)

    def overwritten(
        self, padded: Tensor, firing: Firing, steps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Where cells fire in some of the steps, flat in ``(B, *padded)``, and their own channels.

        Where all channels take no more memory, or a GPU would wait for the number of cells: none,
        and the channels of all cells.
        """
        share = 1 - (1 - self.threshold / 2**32) ** len(steps)
        width = (self.num_channels - self.in_channels) * padded.element_size()
        if share * (width + 8) >= width or padded.device.type != "cpu":
            return torch.empty(0, dtype=torch.int64), self.own(padded).clone()
        size = list(interior(padded, self.radius).shape[2:])
        whole = Block(0, len(padded), 0, size[0])
        fires = self.fires(firing, steps[0], whole, size)
        for step in steps[1:]:
            fires = fires | self.fires(firing, step, whole, size)
        positions = self.positions(fires)
        return positions, as_rows(padded)[:, self.in_channels :].index_select(0, positions)

    def restore(self, padded: Tensor, kept: list[Tensor]) -> None:
        """Undo steps in place by what was `overwritten` last, which is taken off ``kept``."""
        states, positions = kept.pop(), kept.pop()
        if states.dim() > 2:
            self.own(padded).copy_(states)
        else:
            as_rows(padded)[:, self.in_channels :].index_copy_(0, positions, states)
        reflect(padded, self.radius)

    @torch.jit.unused
    def run_with_gradients(
        self, image: Tensor, coarse: Coarse, firing: Firing, rule: list[Tensor], room: Tensor
    ) -> Tensor:
        """All steps in place, with gradients, as `Trajectory` has them."""
        weights = [*rule, *(weight for weight in self.norm.parameters() if weight.requires_grad)]
        whole = Block(0, image.shape[0], 0, image.shape[2])
        cells = enlarge(coarse, whole, list(image.shape[2:]))
        result: Tensor = Trajectory.apply(self, image, cells, firing, room, len(rule), *weights)  # type: ignore[no-untyped-call]
        return result


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether a GPU is NVIDIA's, from Ampere on, and Triton 3.3 or later compiles for it."""
    if torch.version.cuda is None or not pytorch_after(2, 7):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    number = torch.zeros(1, device=device)
    try:
        from mednca_monai import fused  # Triton may be missing

        fused.probe(number)
    except Exception as error:
        message = f"MedNCA takes PyTorch's operations, as Triton does not work on '{device}': "
        logging.getLogger(__name__).warning(message + str(error))
        return False
    return True


def fill_up(cells: Tensor, usual: int) -> Tensor:
    """Repeat the first of ``(N,)`` up to a usual length; beyond it, by steps of about a sixteenth.

    oneDNN compiles for each length anew, and freed memory is used again where lengths recur.

    Example:
        >>> [len(fill_up(torch.arange(n), 2048)) for n in (0, 1, 2048, 2049)]
        [0, 2048, 2048, 2176]
    """
    count = len(cells)
    if count == 0:
        return cells
    more, step = max(count - usual, 0), math.ceil(usual / 1024) * 64
    return torch.cat([cells, cells[:1].expand(usual + math.ceil(more / step) * step - count)])


def add(change: Change, target: Tensor) -> None:
    """Add a change in place to the cells of a lattice, or to the rows of a padded block."""
    values, positions = change
    if positions is None:
        target.add_(values)
    else:
        target.index_add_(0, positions, values.to(target.dtype))


def rectified(x: Tensor) -> Tensor:
    """Negative numbers to zero, in place where that is no burden to autograd."""
    return x.relu() if torch.is_grad_enabled() else x.relu_()


def has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether the processor has some, as Intel's AMX: computing all cells beats gathering half."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    return dtype == torch.bfloat16 and HAS_AMX


def autocast(x: Tensor) -> Tensor:
    """As operations under autocast on the CPU would take it; they leave float64 alone."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return x
    if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


class Trajectory(torch.autograd.Function):
    """All steps of an automaton, whose backward pass computes their hidden layers again.

    Kept are the last cells, the `moments` of each step and what each segment of ``segment_steps``
    steps overwrites: the cells that fire in it, as they were. Backward, a segment is undone, all of
    its steps but the last are taken again, and what they overwrite is kept. Then, from the last
    step to the first and block by block, come a step's hidden layer and its gradients, by the same
    `CellularAutomaton.change` that made the step, and the step before is undone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        automaton: CellularAutomaton,
        image: Tensor,
        cells: Tensor,
        firing: Firing,
        room: Tensor,
        length: int,
        *weights: Tensor,
    ) -> Tensor:
        """Cells after all steps; the weights are the rule's, ``length``, then the norm's."""
        rule = [weight.detach() for weight in weights[:length]]
        padded, blocks = automaton.pad(image), automaton.blocks(cells)
        own = automaton.own(padded)
        own.copy_(cells)
        reflect(padded, automaton.radius)
        kept: list[Tensor] = []
        ctx.moments = []
        steps = range(automaton.steps)
        for first in steps[:: automaton.segment_steps]:
            segment = steps[first : first + automaton.segment_steps]
            kept += automaton.overwritten(padded, firing, segment)
            for step in segment:
                ctx.moments.append(automaton.moments(padded, rule, blocks))
                normed = automaton.normed(rule, ctx.moments[step])
                automaton.advance(padded, firing, step, normed, blocks, room)
        device = image.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.automaton, ctx.firing, ctx.blocks = automaton, firing, blocks
        ctx.length, ctx.count, ctx.segment_steps = length, len(weights), automaton.segment_steps
        ctx.save_for_backward(image, own, *weights, *kept)
        return own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of image, cells and weights."""
        automaton: CellularAutomaton = ctx.automaton
        image, last, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.count], saved[ctx.count :]
        rule = [weight.detach().requires_grad_() for weight in weights[: ctx.length]]
        weights = [*rule, *weights[ctx.length :]]
        sums = [torch.zeros_like(weight) for weight in weights]
        buffers = [buffer.clone() for buffer in automaton.norm.buffers()]
        padded = automaton.pad(image)
        with torch.autocast(*ctx.autocast):
            room = automaton.room(image, image.new_empty([0]))
        own, upstream = automaton.own(padded), torch.zeros_like(padded)
        own.copy_(last)
        automaton.own(upstream).copy_(gradient)
        steps = range(len(ctx.firing.drawn))  # of the forward pass
        retreat = Trajectory.retreat_normed if ctx.moments[0] else Trajectory.retreat
        for first in reversed(steps[:: ctx.segment_steps]):
            automaton.restore(padded, kept)
            segment = steps[first : first + ctx.segment_steps]
            for step in segment[:-1]:
                kept += automaton.overwritten(padded, ctx.firing, [step])
                with torch.autocast(*ctx.autocast):
                    normed = automaton.normed(rule, ctx.moments[step])
                    automaton.advance(padded, ctx.firing, step, normed, ctx.blocks, room)
            for step in reversed(segment):
                retreat(ctx, padded, upstream, step, weights, sums, room)
                if step > first:
                    automaton.restore(padded, kept)
        for buffer, value in zip(automaton.norm.buffers(), buffers, strict=True):
            buffer.copy_(value)  # as the forward pass left it
        of_image = interior(upstream, automaton.radius)[:, : automaton.in_channels]
        return None, of_image, automaton.own(upstream), None, None, None, *sums

    @staticmethod
    def retreat(
        ctx: Any,
        padded: Tensor,
        upstream: Tensor,
        step: int,
        weights: list[Tensor],
        sums: list[Tensor],
        room: Tensor,
    ) -> None:
        """Turn the gradient of the state after a step into that of the state before it, in place.

        What a block adds to the gradients around it waits until the next one has read its own.

        Args:
            ctx: of the forward pass.
            padded: state before the step.
            upstream: gradient of the state after it, padded with zeros.
            step: number of the step.
            weights: the rule's and those of the normalisation.
            sums: gradients of ``weights``, added to in place.
            room: of `CellularAutomaton.room`.
        """
        automaton: CellularAutomaton = ctx.automaton
        radius, rule = automaton.radius, weights[: ctx.length]
        firsts, stride = automaton.lattices(ctx.firing, step)
        gathered = None if automaton.is_whole(ctx.blocks) else room
        device, dtype, enabled = ctx.autocast
        waiting: list[tuple[Tensor, Tensor]] = []
        for block in ctx.blocks:
            states, gradients = part(padded, block, radius), part(upstream, block, radius)
            after = interior(gradients, radius)
            fires = automaton.mask(ctx.firing, step, block, list(after.shape[2:]))
            found: list[tuple[Tensor, Tensor]] = []
            for first in firsts:
                target = lattice(after, first, stride)
                if target.numel() > 0:
                    window = lattice(states, first, 1).detach().requires_grad_()
                    with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                        change, positions = automaton.change(window, rule, fires, stride, gathered)
                    if positions is not None:
                        target = as_rows(gradients).index_select(0, positions)
                    of_window, *of_weights = torch.autograd.grad(
                        change, [window, *weights], target.to(change.dtype)
                    )
                    found.append((lattice(gradients, first, 1), of_window))
                    for total, of_weight in zip(sums, of_weights, strict=True):
                        total.add_(of_weight)
            for around, of_window in waiting:
                around.add_(of_window)
            waiting = found
        for around, of_window in waiting:
            around.add_(of_window)
        unreflect(upstream, radius)

    @staticmethod
    def retreat_normed(
        ctx: Any,
        padded: Tensor,
        upstream: Tensor,
        step: int,
        weights: list[Tensor],
        sums: list[Tensor],
        room: Tensor,
    ) -> None:
        """As `retreat`, where the rule takes in its normalisation.

        First with mean and variance held fixed, then what flows through them to all cells.
        """
        automaton: CellularAutomaton = ctx.automaton
        radius, rule = automaton.radius, weights[: ctx.length]
        moments = [moment.detach().requires_grad_() for moment in ctx.moments[step]]
        with torch.enable_grad():
            normed = automaton.normed(rule, moments)
        leaves = [weight.detach().requires_grad_() for weight in normed]
        of_normed = [torch.zeros_like(leaf) for leaf in leaves]
        Trajectory.retreat(ctx, padded, upstream, step, leaves, of_normed, room)
        *of_weights, of_mean, of_variance = torch.autograd.grad(
            normed, [*weights, *moments], of_normed
        )
        for total, of_weight in zip(sums, of_weights, strict=True):
            total.add_(of_weight)
        cells, shape = interior(padded, radius)[:, 0].numel(), [-1] + [1] * automaton.spatial_dims
        mean, of_mean = ctx.moments[step][0].view(shape), (of_mean / cells).view(shape)
        slope = (of_variance * 2 / cells).view(shape)
        places = [0, *range(2, ctx.length)]  # of the weights that lead to the hidden layer
        for block in ctx.blocks:
            window = part(padded, block, radius).detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                x = automaton.hidden_layer(channels_last(window), rule, 1)
            of_x = (x.detach() - mean).mul_(slope).add_(of_mean)
            of_window, *of_weights = torch.autograd.grad(
                x, [window, *(weights[place] for place in places)], of_x
            )
            part(upstream, block, radius).add_(of_window)
            for place, of_weight in zip(places, of_weights, strict=True):
                sums[place].add_(of_weight)
        unreflect(upstream, radius)
