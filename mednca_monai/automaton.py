"""The cell automaton of one level: cells perceive their neighbourhood, firing cells update."""

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_norm_layer
from torch import Tensor, nn

from mednca_monai.firing import independent_fires, step_digest, sublattice_fires


def reflect_pad(state: Tensor, radius: int) -> Tensor:
    """Pad every spatial axis by ``radius`` cells as ``numpy.pad(mode="reflect")`` does.

    An axis shorter than the radius is reflected repeatedly, one of length 1 is repeated. Pieces are
    split off and joined, since ``torch.nn.functional.pad`` does neither and has no deterministic
    CUDA backward; the backward of a split is one copy.

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
        period = max(2 * (length - 1), 1)
        single = [1] * (radius + 1)
        middle = [length - 2 * len(single)]
        sizes = single + middle + single if middle[0] > 0 else [1] * length
        cells = torch.split(state, sizes, axis)
        pieces: list[Tensor] = []
        for i in range(-radius, 0):
            pieces.append(cells[min(i % period, period - i % period)])
        pieces += list(cells)
        for i in range(length, length + radius):
            j = min(i % period, period - i % period)
            pieces.append(cells[j] if j <= radius else cells[j - length])
        state = torch.cat(pieces, axis)
    return state


class CellularAutomaton(nn.Module):
    """A learnt rule that every cell of a grid follows, over and over.

    A cell is ``num_channels`` numbers: the image's channels, which never change, then its own. In a
    step it perceives (its state and learnt convolutions of the state around it), and the cells that
    fire add to their own channels what two dense layers make of that perception. The last layer
    starts at zero, so a new automaton changes nothing.

    Perception and the first dense layer are both linear: with dense perception they run as one
    convolution, folded anew in each `forward`, while the weights stay separate parameters.

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
        fire_rate: probability in (0, 1] that a cell is updated in a step.
        firing: ``"independent"`` or ``"sublattices"``, see `mednca_monai.firing`.
        kernel_size: odd width of the perceived neighbourhood, in cells.
        perception: ``"dense"`` (two dense convolutions) or ``"depthwise"`` (one depthwise).
        norm: MONAI name or (name, arguments) of the hidden layer's normalisation, or ``None``.
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
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_channels = num_channels
        self.level = level
        self.steps = steps
        self.threshold = round(fire_rate * 2**32)
        self.firing = firing
        self.radius = kernel_size // 2
        self.is_dense = perception == "dense"
        convolution = Conv[Conv.CONV, spatial_dims]
        around = 2 * num_channels if self.is_dense else num_channels
        groups = 1 if self.is_dense else num_channels
        self.perception = convolution(num_channels, around, kernel_size, groups=groups)
        self.hidden = convolution(num_channels + around, hidden_size, 1)
        try:
            self.norm = nn.Identity()
            if norm is not None:
                self.norm = get_norm_layer(norm, spatial_dims, hidden_size)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`norm` must be a MONAI normalisation, got {norm!r}: {error}"
            ) from error
        self.update = convolution(hidden_size, num_channels, 1, bias=False)
        nn.init.zeros_(self.update.weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """Convolve ``(B, C, *spatial)`` without padding, in 2-D or 3-D."""
        if self.spatial_dims == 2:
            return nn.functional.conv2d(x, weight, bias, groups=groups)
        return nn.functional.conv3d(x, weight, bias, groups=groups)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weights from the padded state (dense) or the perception (depthwise) to the hidden layer.

        Returns:
            Kernel, ``(hidden_size, num_channels, *kernel)`` if dense, else ``(hidden_size, 2 *
            num_channels, *ones)``; bias, ``(hidden_size,)``, what is perceived of a zero state.
        """
        own, around = self.hidden.weight.tensor_split([self.num_channels], 1)
        zeros = own.new_zeros([1, self.num_channels] + [2 * self.radius + 1] * self.spatial_dims)
        no_state = [0, 0] * self.spatial_dims + [self.num_channels, 0]
        bias = self.hidden(nn.functional.pad(self.perception(zeros), no_state))
        kernel = self.hidden.weight
        if self.is_dense:
            kernel = torch.einsum("hp...,pc...->hc...", around, self.perception.weight)
            kernel = kernel + nn.functional.pad(own, [self.radius] * (2 * self.spatial_dims))
        return kernel, bias.flatten()

    def perceive(self, state: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Hidden layer before its normalisation, ``(B, hidden_size, *spatial)``."""
        padded = reflect_pad(state, self.radius)
        if self.is_dense:
            return self.convolve(padded, kernel, bias)
        around = self.convolve(padded, self.perception.weight, None, self.num_channels)
        return self.convolve(torch.cat([state, around], 1), kernel, bias)

    def fires(self, seed: Tensor, step: int, start: Tensor, size: list[int]) -> Tensor:
        """Which cells fire in a step, booleans that broadcast to ``(B, 1, *size)``."""
        digest = step_digest(seed, self.level, step)
        if self.firing == "sublattices":
            return sublattice_fires(digest, start, size)
        return independent_fires(digest, start, size, self.threshold)

    def forward(self, state: Tensor, seed: Tensor, start: Tensor) -> Tensor:
        """Apply the rule ``steps`` times.

        Args:
            state: ``(B, num_channels, *spatial)``, the image's channels first.
            seed: int64, ``(1,)`` or ``(B,)``.
            start: absolute position of the first cell, int64, ``(1, spatial_dims)`` or
                ``(B, spatial_dims)``.

        Returns:
            The state afterwards, ``(B, num_channels, *spatial)``.
        """
        kernel, bias = self.fold()
        no_image = [0, 0] * (1 + self.spatial_dims) + [self.in_channels, 0]
        update = nn.functional.pad(self.update.weight[self.in_channels :], no_image)
        channels_last = torch.channels_last if self.spatial_dims == 2 else torch.channels_last_3d
        state = state.contiguous(memory_format=channels_last)  # the faster one on CPU and GPU
        for step in range(self.steps):
            hidden = self.norm(self.perceive(state, kernel, bias)).relu_()
            change = self.convolve(hidden, update, None)
            state = state + change * self.fires(seed, step, start, list(state.shape[2:]))
        return state
