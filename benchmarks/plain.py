"""The papers' network written plainly: the baseline that all other figures are ratios to.

Every step runs two convolutions (or one depthwise), a concatenation, two dense layers on
channels-last states and a random mask, and puts the image channel back, as the papers describe
and their released code does (https://arxiv.org/abs/2302.03473, https://arxiv.org/abs/2309.02954).
"""

import torch
from torch import Tensor, nn


class PlainAutomaton(nn.Module):
    """One level; states are ``(B, *spatial, num_channels)``."""

    def __init__(
        self,
        spatial_dims: int,
        num_channels: int,
        hidden_size: int,
        steps: int,
        kernel_size: int,
        depthwise: bool,
        in_order: bool,
    ) -> None:
        super().__init__()
        self.in_order = in_order
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        settings = {"padding": kernel_size // 2, "padding_mode": "reflect"}
        settings["groups"] = num_channels if depthwise else 1
        self.convolutions = nn.ModuleList(
            convolution(num_channels, num_channels, kernel_size, **settings)
            for _ in range(1 if depthwise else 2)
        )
        self.hidden = nn.Linear((2 if depthwise else 3) * num_channels, hidden_size)
        normed = nn.BatchNorm3d if spatial_dims == 3 else nn.BatchNorm2d
        self.norm = normed(hidden_size, track_running_stats=False) if depthwise else None
        self.update = nn.Linear(hidden_size, num_channels, bias=False)
        self.steps = steps

    def channels_first(self, x: Tensor) -> Tensor:
        """``(B, *spatial, C)`` to ``(B, C, *spatial)``; the released code swaps spatial axes."""
        return x.movedim(-1, 1) if self.in_order else x.transpose(1, -1)

    def channels_last(self, x: Tensor) -> Tensor:
        """The way back."""
        return x.movedim(1, -1) if self.in_order else x.transpose(1, -1)

    def step(self, state: Tensor) -> Tensor:
        """Update each cell with probability one half."""
        x = self.channels_first(state)
        x = torch.cat([x] + [convolution(x) for convolution in self.convolutions], 1)
        x = self.hidden(self.channels_last(x))
        if self.norm is not None:
            x = self.channels_last(self.norm(self.channels_first(x)))
        change = self.update(nn.functional.relu(x))
        fires = (torch.rand(*change.shape[:-1], 1, device=change.device) > 0.5).to(change)
        return state + change * fires

    def forward(self, state: Tensor) -> Tensor:
        """All steps; the image, channel 0, is put back after each."""
        image = state[..., :1]
        for _ in range(self.steps):
            state = torch.cat([image, self.step(state)[..., 1:]], -1)
        return state


class PlainMedNCA(nn.Module):
    """Two levels on one-channel images whose size the scale factor divides."""

    def __init__(
        self,
        spatial_dims: int,
        num_channels: int,
        hidden_size: int,
        steps: tuple[int, int],
        kernel_size: tuple[int, int] = (3, 3),
        scale_factor: tuple[int, ...] = (4, 4),
        depthwise: bool = False,
        in_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.scale_factor = scale_factor
        self.levels = nn.ModuleList(
            PlainAutomaton(
                spatial_dims,
                num_channels,
                hidden_size,
                steps[i],
                kernel_size[i],
                depthwise,
                in_order,
            )
            for i in range(2)
        )

    def forward(
        self, image: Tensor, start: list[list[int]] | None = None, size: tuple[int, ...] = ()
    ) -> Tensor:
        """Logits ``(B, 1, *spatial)``, or of one patch per image, of ``size`` from ``start`` on."""
        pool = nn.functional.avg_pool2d if image.dim() == 4 else nn.functional.avg_pool3d
        coarse = pool(image, self.scale_factor).movedim(1, -1)
        zeros = coarse.new_zeros(*coarse.shape[:-1], self.num_channels - 1)
        state = self.levels[0](torch.cat([coarse, zeros], -1)).movedim(-1, 1)
        for axis, factor in enumerate(self.scale_factor, 2):
            state = state.repeat_interleave(factor, axis)
        state = torch.cat([image, state[:, 1:]], 1)
        if start is not None:
            ends = [[a + n for a, n in zip(place, size, strict=True)] for place in start]
            boxes = [(slice(None), *map(slice, *place)) for place in zip(start, ends, strict=True)]
            state = torch.stack([x[box] for x, box in zip(state, boxes, strict=True)])
        return self.levels[1](state.movedim(1, -1)).movedim(-1, 1)[:, 1:2]
