"""Med-NCA: cell automata on a pyramid of image sizes, from coarse to fine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from monai.data.meta_tensor import MetaTensor
from monai.utils.type_conversion import convert_to_dst_type
from torch import Tensor, nn

from mednca_monai.automaton import CellularAutomaton
from mednca_monai.checks import check_int, check_ints, is_number
from mednca_monai.grid import Coarse


def with_meta(x: Tensor, source: Tensor) -> Tensor:
    """``x`` with the meta data that ``source`` has, if any; dtype and device stay its own."""
    result: Tensor = convert_to_dst_type(x, source, dtype=x.dtype, device=x.device)[0]
    return result


class Region(NamedTuple):
    """A box of cells on one level, for each image of a batch: where it starts and how large it is.

    Attributes:
        start: first cell, int64, ``(1, spatial_dims)`` (the same for all) or ``(B, spatial_dims)``.
        size: number of cells along each axis.
    """

    start: Tensor
    size: list[int]


def reduce(image: Tensor, scale_factor: list[int]) -> Tensor:
    """Mean of blocks of ``scale_factor`` cells; blocks at the end may be smaller.

    Args:
        image: ``(B, C, *spatial)``.
        scale_factor: one per axis.

    Returns:
        ``(B, C, *(ceil(n / s) for n, s in zip(spatial, scale_factor)))``.

    Example:
        >>> reduce(torch.arange(5.0).view(1, 1, 1, 5), [1, 2]).flatten().tolist()
        [0.5, 2.5, 4.0]
    """
    if image.dim() == 4:
        return nn.functional.avg_pool2d(image, scale_factor, ceil_mode=True)
    # in two turns: 3-D pooling refuses images smaller than a block, and half precision on the CPU
    slices = nn.functional.avg_pool2d(image.flatten(0, 1), scale_factor[1:], ceil_mode=True)
    rows = nn.functional.avg_pool2d(slices.flatten(2), [scale_factor[0], 1], ceil_mode=True)
    return rows.view(image.shape[0], image.shape[1], -1, slices.shape[2], slices.shape[3])


def crop(x: Tensor, region: Region) -> Tensor:
    """Cut ``region`` out of ``(B, C, *spatial)``, at its own place for each item of the batch."""
    if len(region.start) == 1:  # without a copy
        for axis, length in enumerate(region.size):
            x = x.narrow(axis + 2, int(region.start[0, axis]), length)
        return x
    items: list[Tensor] = []
    for i, item in enumerate(x):
        start = region.start[i]
        for axis, length in enumerate(region.size):
            item = item.narrow(axis + 1, int(start[axis]), length)
        items.append(item)
    return torch.stack(items)


class MedNCA(nn.Module):
    """Segmentation network that iterates a tiny learnt rule per level over all cells of an image.

    The image is reduced ``num_levels - 1`` times. On the coarsest level every cell holds the
    image's channels and zeros; a `CellularAutomaton` runs ``steps`` times. Its state, enlarged,
    with the finer image's channels in place of the coarse ones, starts the next level. The logits
    are the channels after the image's on the finest level. A new network's logits are zero.

    Which cells fire in a step is a pure function of seed, level, step and position. In ``eval()``
    an image without a seed always gives the same logits, to rounding; in ``train()`` every forward
    draws seeds from torch's generator.

    Reference:
        Kalkhof, J., González, C., Mukhopadhyay, A., "Med-NCA: Robust and Lightweight Segmentation
        with Neural Cellular Automata", IPMI 2023, https://arxiv.org/abs/2302.03473.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image, at least 1.
        out_channels: channels of the logits, at least 1.
        num_channels: channels of a cell, at least ``in_channels + out_channels``.
        hidden_size: width of the rule's hidden layer, at least 1.
        steps: updates on a level, at least 1; one value or one per level, coarse to fine.
        fire_rate: probability that a cell is updated in a step, in [2**-32, 1].
        firing: ``"independent"``, each cell by itself; or ``"sublattices"``, half of the 2**d
            sublattices of even and odd positions in each step (needs ``fire_rate=0.5``).
        num_levels: number of levels, at least 1.
        scale_factor: how many cells along an axis one cell of the next coarser level stands for,
            at least 1; one value or one per axis.
        kernel_size: odd width of the perceived neighbourhood, in cells; one value or one per level,
            coarse to fine.
        perception: ``"dense"`` (the state and two dense convolutions of it) or ``"depthwise"`` (the
            state and one depthwise convolution of it).
        norm: MONAI name, or (name, arguments), of a normalisation of the hidden layer; ``None``.
        segment_steps: training goes back by segments of so many steps, at least 1, and takes all
            steps of a segment but its last again: more than 1 costs time and saves memory, by a
            GPU's kernels most, and most near the square root of ``steps``.

    Raises:
        ValueError: where an argument breaks its rule.

    Example:
        >>> network = MedNCA(spatial_dims=2, in_channels=1, out_channels=3, steps=8).eval()
        >>> image = torch.rand(2, 1, 50, 37)
        >>> bool((network(image) == network(image)).all()), tuple(network(image).shape)
        (True, (2, 3, 50, 37))
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        num_channels: int = 32,
        hidden_size: int = 128,
        steps: int | Sequence[int] = 64,
        fire_rate: float = 0.5,
        firing: str = "independent",
        num_levels: int = 2,
        scale_factor: int | Sequence[int] = 4,
        kernel_size: int | Sequence[int] = 3,
        perception: str = "dense",
        norm: str | tuple[str, dict[str, object]] | None = None,
        segment_steps: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(spatial_dims, int) or spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims!r}.")
        self.spatial_dims = spatial_dims
        self.in_channels = check_int("in_channels", in_channels, 1)
        self.out_channels = check_int("out_channels", out_channels, 1)
        self.num_channels = check_int("num_channels", num_channels, in_channels + out_channels)
        check_int("hidden_size", hidden_size, 1)
        check_int("num_levels", num_levels, 1)
        self.steps = check_ints("steps", steps, num_levels, "level")
        self.scale_factor = check_ints("scale_factor", scale_factor, spatial_dims, "axis")
        self.kernel_size = check_ints("kernel_size", kernel_size, num_levels, "level")
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size!r}.")
        if not is_number(fire_rate) or not 2**-32 <= fire_rate <= 1:  # of 32-bit hashes
            raise ValueError(f"`fire_rate` must be a number in [2**-32, 1], got {fire_rate!r}.")
        if firing not in ("independent", "sublattices"):
            raise ValueError(f"`firing` must be 'independent' or 'sublattices', got {firing!r}.")
        if firing == "sublattices" and fire_rate != 0.5:
            raise ValueError(
                f"`fire_rate` must be 0.5 where firing is 'sublattices', got {fire_rate!r}."
            )
        if perception not in ("dense", "depthwise"):
            raise ValueError(f"`perception` must be 'dense' or 'depthwise', got {perception!r}.")
        self.levels = nn.ModuleList(
            CellularAutomaton(
                spatial_dims,
                in_channels,
                num_channels,
                hidden_size,
                level=level,
                steps=self.steps[level],
                fire_rate=fire_rate,
                firing=firing,
                kernel_size=self.kernel_size[level],
                perception=perception,
                norm=norm,
                segment_steps=check_int("segment_steps", segment_steps, 1),
            )
            for level in range(num_levels)
        )

    @classmethod
    def med_nca(cls, **arguments: object) -> "MedNCA":
        """Network with the settings of the Med-NCA paper (70,016 parameters), bar ``arguments``."""
        settings: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
        return cls(**{**settings, **arguments})

    @classmethod
    def m3d_nca(cls, **arguments: object) -> "MedNCA":
        """Network with the M3D-NCA paper's prostate settings (12,480 parameters), bar arguments."""
        settings: dict[str, Any] = {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 1,
            "num_channels": 16,
            "hidden_size": 64,
            "steps": (20, 40),
            "kernel_size": (7, 3),
            "perception": "depthwise",
            "norm": ("batch", {"track_running_stats": False}),
        }
        return cls(**{**settings, **arguments})

    def forward(
        self,
        image: Tensor,
        seed: Tensor | None = None,
        regions: list[Region] | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """Segment whole images, or run every level on a region whose edge acts as an image's edge.

        Args:
            image: ``(B, in_channels, *spatial)``, of any size.
            seed: int64, one per image, ``(B,)``; ``None`` as the class describes.
            regions: one per level, coarse to fine, in cells of the level that ``image`` reduces to,
                each inside the one before, enlarged; ``None`` is the whole image.
            origin: where ``image`` begins in a larger image, in cells of the coarsest level, int64,
                ``(1, spatial_dims)``; ``None`` is the beginning.

        Returns:
            Logits of the image, ``(B, out_channels, *spatial)``, or of the finest region.

        Raises:
            ValueError: where ``image`` has another rank or number of channels, is not floating
                point, or is empty, or ``seed`` has another shape.
        """
        if not torch.jit.is_scripting() and isinstance(image, MetaTensor):  # type: ignore[attr-defined]
            logits = self.forward(image.as_tensor(), seed, regions, origin)
            return with_meta(logits, image)
        self.check_image(image)
        seed = self.seeds(image, seed)
        factor = torch.tensor(self.scale_factor)
        first = torch.zeros(1, self.spatial_dims, dtype=torch.int64)
        if origin is not None:
            first = origin.cpu()
        images = self.pyramid(image)
        own = self.num_channels - self.in_channels
        cells = torch.zeros_like(images[0][:, :1]).expand([-1, own] + [-1] * self.spatial_dims)
        outer, scale_factor = first, [1] * self.spatial_dims
        room = image.new_empty([0])
        for level, automaton in enumerate(self.levels):
            image, start, starts = images[level], first, [[0] * self.spatial_dims]
            if regions is not None:
                region = Region(regions[level].start.cpu(), regions[level].size)
                image, start = crop(image, region), region.start + first
                places: list[list[int]] = (start - outer).tolist()  # TorchScript wants the type
                starts = places
            coarse = Coarse(cells, scale_factor, starts)
            room = automaton.room(images[-1], room)  # type: ignore[operator]
            cells = automaton(image, coarse, seed, start.to(image.device), room)
            outer, scale_factor = start * factor, self.scale_factor
            first = first * factor
        return cells[:, : self.out_channels].contiguous()  # without the memory of the others

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """The image on every level, coarse to fine, each ``(B, in_channels, *spatial)``."""
        images = [image]
        for _ in range(len(self.levels) - 1):
            images.insert(0, reduce(images[0], self.scale_factor))
        return images

    def check_image(self, image: Tensor) -> None:
        """Raise ValueError where an image has another rank, type or channels, or is empty."""
        if image.dim() != self.spatial_dims + 2:
            raise ValueError(
                f"`image` must have {self.spatial_dims + 2} axes (batch, channel, "
                f"{self.spatial_dims} spatial), got shape {list(image.shape)}."
            )
        if not image.is_floating_point():
            raise ValueError(f"`image` must be floating point, got {image.dtype}.")
        if image.shape[1] != self.in_channels:
            raise ValueError(
                f"`image` must have {self.in_channels} channels, got shape {list(image.shape)}."
            )
        if image.numel() == 0:
            raise ValueError(f"`image` must not be empty, got shape {list(image.shape)}.")

    def seeds(self, image: Tensor, seed: Tensor | None) -> Tensor:
        """Given seeds, in ``eval()`` a fixed one, in ``train()`` new ones; ``(1,)`` or ``(B,)``."""
        if seed is None:
            if not self.training:
                return torch.zeros(1, dtype=torch.int64, device=image.device)
            return torch.randint(1 << 62, [image.shape[0]], dtype=torch.int64).to(image.device)
        if seed.dtype != torch.int64 or list(seed.shape) != [image.shape[0]]:
            raise ValueError(
                f"`seed` must be int64 of shape [{image.shape[0]}], "
                f"got {seed.dtype} of shape {list(seed.shape)}."
            )
        return seed.to(image.device)

    def norm_spans_cells(self) -> bool:
        """Whether a normalisation's statistics make a cell depend on cells far away."""
        norms = (level.get_submodule("norm") for level in self.levels)
        return any(
            not isinstance(norm, (nn.Identity, nn.LocalResponseNorm))
            and (norm.training or not getattr(norm, "track_running_stats", False))
            for norm in norms
        )

    def patch_regions(
        self, shape: Sequence[int], start: Tensor, size: Sequence[int]
    ) -> list[Region]:
        """Regions that train a patch: the coarsest level whole, the finer ones where the patch is.

        Args:
            shape: spatial size of the image.
            start: first cell of each image's patch, int64, ``(B, spatial_dims)``.
            size: of the patch.

        Returns:
            One region per level, coarse to fine.
        """
        shapes = self.shapes(shape)
        factor = torch.tensor(self.scale_factor)
        regions = [Region(start.cpu(), list(size))]
        for level in range(len(self.levels) - 2, 0, -1):
            axes = zip(regions[0].size, self.scale_factor, shapes[level], strict=True)
            extent = [min(-(-(n + s - 1) // s), whole) for n, s, whole in axes]
            last = torch.tensor(shapes[level]) - torch.tensor(extent)
            regions.insert(0, Region(torch.minimum(regions[0].start // factor, last), extent))
        if len(self.levels) > 1:
            regions.insert(0, Region(torch.zeros_like(regions[0].start[:1]), shapes[0]))
        return regions

    def context_regions(
        self, shape: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> list[Region]:
        """Regions that hold all cells whose influence can reach a box of the image.

        Args:
            shape: spatial size of the image.
            start: first cell of the box.
            stop: cell after its last along each axis.

        Returns:
            One region per level, coarse to fine.
        """
        regions: list[Region] = []
        begin, end = list(start), list(stop)
        for level, whole in reversed(list(enumerate(self.shapes(shape)))):
            reach = self.reach(level)
            begin = [max(a - reach, 0) for a in begin]
            end = [min(b + reach, n) for b, n in zip(end, whole, strict=True)]
            size = [b - a for a, b in zip(begin, end, strict=True)]
            regions.insert(0, Region(torch.tensor([begin]), size))
            begin = [a // s for a, s in zip(begin, self.scale_factor, strict=True)]
            end = [-(-b // s) for b, s in zip(end, self.scale_factor, strict=True)]
        return regions

    def reach(self, level: int) -> int:
        """How far a cell's influence travels on a level, in its cells."""
        return self.steps[level] * (self.kernel_size[level] // 2)

    def shapes(self, shape: Sequence[int]) -> list[list[int]]:
        """Spatial size of an image on every level, coarse to fine."""
        shapes = [list(shape)]
        for _ in range(len(self.levels) - 1):
            axes = zip(shapes[0], self.scale_factor, strict=True)
            shapes.insert(0, [-(-n // s) for n, s in axes])
        return shapes
