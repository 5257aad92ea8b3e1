"""Run a network on patches (to train it), tiles (any image size) and over seeds (uncertainty)."""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
from monai.engines.utils import PrepareBatch, default_prepare_batch
from monai.inferers.inferer import Inferer
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from mednca_monai.checks import check_finite, check_int, check_ints
from mednca_monai.network import MedNCA, Region, crop, with_meta

# tiles give freed memory back to the system once for so many cells with context, as it costs time
CELLS_PER_RETURN = 2**18


def check_patch(roi_size: int | Sequence[int], shape: Sequence[int]) -> list[int]:
    """Return the size of a patch in an image of size ``shape``, else raise ValueError."""
    size = check_ints("roi_size", roi_size, len(shape), "axis")
    if any(n > whole for n, whole in zip(size, shape, strict=True)):
        raise ValueError(f"`roi_size` must fit into the image, {list(shape)}, got {roi_size!r}.")
    return size


def check_roi(roi_size: int | Sequence[int]) -> int | Sequence[int]:
    """Return ``roi_size`` if it is made of positive integers, else raise ValueError."""
    check_ints("roi_size", roi_size, len(roi_size) if isinstance(roi_size, Sequence) else 1, "axis")
    return roi_size


def check_start(start: Tensor, roi_size: Sequence[int], inputs: Tensor) -> None:
    """Raise ValueError where ``start`` is not one place per image where a patch fits."""
    shape = [len(inputs), len(roi_size)]
    last = torch.tensor(inputs.shape[2:]) - torch.tensor(roi_size)
    if start.dtype != torch.int64 or list(start.shape) != shape:
        found = f"{start.dtype} of shape {list(start.shape)}"
        raise ValueError(f"`patch_start` must be int64 of shape {shape}, got {found}.")
    if bool(((start.cpu() < 0) | (start.cpu() > last)).any()):
        raise ValueError(f"`patch_start` must be from 0 to {last.tolist()}, got {start.tolist()}.")


def box(start: Sequence[int], stop: Sequence[int]) -> tuple[Any, ...]:
    """Index of the cells from ``start`` to before ``stop``, of ``(B, C, *spatial)``."""
    return (..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))


def cut(length: int, size: int, context: int) -> list[tuple[int, int]]:
    """Cut an axis into tiles that are of one size with their context, the last one at most.

    Args:
        length: of the axis.
        size: of a tile that touches neither end, without context.
        context: cells that a tile needs on each side, where the axis has them.

    Returns:
        First cell of each tile and the one after its last.

    Example:
        >>> cut(length=30, size=8, context=3)
        [(0, 11), (11, 19), (19, 30)]
    """
    starts = [0, *range(size + context, length - context, size)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def return_freed_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it in ever more places."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none
        if trim is not None:
            trim(0)


def random_starts(batch_size: int, roi_size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw from torch's generator where each patch starts, int64, ``(batch_size, len(shape))``."""
    last = [whole - n for n, whole in zip(roi_size, shape, strict=True)]
    return torch.stack([torch.randint(n + 1, (batch_size,)) for n in last], 1)


class RandomPatchInferer(Inferer):
    """Train on a patch: the coarsest level sees the whole image, finer ones a random patch of it.

    The label must be cropped at the same place: `RandomPatchBatch` does it inside a stock
    ``monai.engines.SupervisedTrainer`` and hands the place on as ``patch_start``.

    Reference:
        Kalkhof, J., González, C., Mukhopadhyay, A., "Med-NCA: Robust and Lightweight Segmentation
        with Neural Cellular Automata", IPMI 2023, section 2.3, https://arxiv.org/abs/2302.03473.

    Args:
        roi_size: size of the patch in cells of the finest level; one value or one per axis.
        amp: whether to compute in bfloat16 (`torch.autocast`), which is faster on processors that
            know it; weights and states stay in their own precision.
    """

    def __init__(self, roi_size: int | Sequence[int], amp: bool = False) -> None:
        super().__init__()
        self.roi_size = check_roi(roi_size)
        self.amp = amp

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *,
        patch_start: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Logits of one patch per image, ``(B, out_channels, *roi_size)``.

        Args:
            inputs: whole images, ``(B, in_channels, *spatial)``.
            network: a `MedNCA`, possibly wrapped for distributed training.
            patch_start: first cell of each patch, int64, ``(B, spatial_dims)``; drawn if ``None``.
            seed: as in `MedNCA.forward`.

        Raises:
            ValueError: where the patch does not fit, or ``inputs`` has another rank or number of
                channels than the network or holds NaN or infinite values.
        """
        module = unwrapped(network)
        module.check_image(inputs)
        check_finite("inputs", inputs)
        shape = inputs.shape[2:]
        size = check_patch(self.roi_size, shape)
        if patch_start is None:
            patch_start = random_starts(len(inputs), size, shape)
        check_start(patch_start, size, inputs)
        regions = module.patch_regions(shape, patch_start, size)
        if not self.amp:  # as the caller may have autocast on
            return network(inputs, seed=seed, regions=regions)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return network(inputs, seed=seed, regions=regions)


class RandomPatchBatch(PrepareBatch):
    """Prepare a trainer's batch for `RandomPatchInferer`: whole images, labels cropped to patches.

    Args:
        roi_size: as the inferer's.
    """

    def __init__(self, roi_size: int | Sequence[int]) -> None:
        self.roi_size = check_roi(roi_size)

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor, tuple[()], dict[str, Tensor]]:
        """Return images, cropped labels, no more arguments, and ``patch_start`` for the inferer.

        Raises:
            ValueError: where the patch does not fit or the label is not of the image's size.
        """
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        shape = image.shape[2:]
        if label is None or label.shape[2:] != shape or len(label) != len(image):
            found = "none" if label is None else list(label.shape)
            raise ValueError(
                f"`batchdata` must hold a label of each image's size, {len(image)} of "
                f"{list(shape)}, got {found}."
            )
        size = check_patch(self.roi_size, shape)
        start = random_starts(len(image), size, shape)
        return image, crop(label, Region(start, size)), (), {"patch_start": start}


class TiledInferer(Inferer):
    """Segment an image tile by tile, in bounded memory; equal to the whole image, to rounding.

    For every tile each level runs on the cells whose influence can reach it, its context, and the
    fire masks know where these cells are. Tiles at an image's edge are larger by the context that
    they lack there, so that all take about the same memory.

    Args:
        roi_size: size of a tile inside an image, without context, in cells of the finest level; one
            value or one per axis. An axis that is no longer than such a tile with its context is
            not cut.
        device: where the logits are put together; ``None`` is the device of the image.
        progress: whether to show a progress bar.
    """

    def __init__(
        self,
        roi_size: int | Sequence[int],
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.roi_size = check_roi(roi_size)
        self.device = device
        self.progress = progress

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *, seed: Tensor | None = None
    ) -> Tensor:
        """Logits, ``(B, out_channels, *spatial)``.

        Args:
            inputs: ``(B, in_channels, *spatial)``.
            network: a `MedNCA`, possibly wrapped; or its TorchScript export, which has no tiles
                and runs on the whole image.
            seed: as in `MedNCA.forward`.

        Raises:
            ValueError: where ``inputs`` holds NaN or infinite values, or a normalisation of the
                network spans cells, so that no tile equals the whole.
        """
        image = convert_to_tensor(inputs, track_meta=False)
        check_finite("inputs", image)
        module = unwrapped(network)
        if not hasattr(module, "norm_spans_cells"):  # TorchScript
            logits = network(image, seed=seed)
            device = logits.device if self.device is None else self.device
            return with_meta(logits.to(device), inputs)
        if module.norm_spans_cells():
            raise ValueError(
                "`norm` must not span cells where an image is tiled, got a network whose "
                "normalisation depends on the other cells of the image."
            )
        module.check_image(image)
        if seed is None:
            seed = module.seeds(image, None).expand(len(image))
        shape = image.shape[2:]
        size = check_ints("roi_size", self.roi_size, len(shape), "axis")
        context, axes = module.reach(len(module.levels) - 1), list(zip(shape, size, strict=True))
        cells = len(image) * math.prod(min(n + 2 * context, whole) for whole, n in axes)
        tiles = list(product(*(cut(whole, n, context) for whole, n in axes)))
        device = image.device if self.device is None else self.device
        logits = image.new_empty((len(image), module.out_channels, *shape), device=device)
        if self.progress:
            tiles = tqdm(tiles, desc="tiles")
        for done, tile in enumerate(tiles, 1):
            start, stop = zip(*tile, strict=True)
            logits[box(start, stop)] = self.tile(image, network, seed, start, stop).to(device)
            if image.device.type == "cpu" and done % max(CELLS_PER_RETURN // cells, 1) == 0:
                return_freed_memory()
        return with_meta(logits, inputs)

    @staticmethod
    def tile(
        image: Tensor,
        network: Callable[..., Tensor],
        seed: Tensor,
        start: Sequence[int],
        stop: Sequence[int],
    ) -> Tensor:
        """Logits of the box from ``start`` to ``stop``, computed on the part that they need."""
        module = unwrapped(network)
        regions = module.context_regions(image.shape[2:], start, stop)
        factor = torch.tensor(module.scale_factor)
        origin = regions[0].start
        begin, end = (
            (place * factor ** (len(regions) - 1)).flatten().tolist()
            for place in (origin, origin + torch.tensor(regions[0].size))
        )
        part = image[box(begin, end)]
        inner = [Region(r.start - origin * factor**i, r.size) for i, r in enumerate(regions)]
        logits = network(part, seed=seed, regions=inner, origin=origin)
        size = [b - a for a, b in zip(start, stop, strict=True)]
        return crop(logits, Region(torch.tensor([start]) - regions[-1].start, size))


class EnsembleInferer(Inferer):
    """Run another inferer over several seeds: mean, spread and a quality score of the segmentation.

    Run number i gives every image the seed i, bound into the network that the inner inferer sees.
    The score is the normalised quality metric: the sum over the cells of the standard deviation of
    1 - P(background), divided by the sum of its mean; 0 is full agreement.

    Reference:
        Kalkhof, J., Mukhopadhyay, A., "M3D-NCA: Robust 3D Segmentation with Built-In Quality
        Control", MICCAI 2023, section 2.3, https://arxiv.org/abs/2309.02954.

    Args:
        inferer: of one run; its outputs are logits, ``(B, out_channels, *spatial)``.
        num_runs: number of seeds, at least 2.

    Raises:
        ValueError: where ``num_runs`` is below 2.
    """

    def __init__(self, inferer: Inferer, num_runs: int = 10) -> None:
        super().__init__()
        self.inferer = inferer
        self.num_runs = check_int("num_runs", num_runs, 2)

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return a dict of ``mean`` and ``std`` (over the runs, of the probabilities), and ``nqm``.

        Probabilities are a sigmoid of one logit, a softmax of several (channel 0 is background);
        ``mean`` and ``std`` are ``(B, out_channels, *spatial)``, ``nqm`` is ``(B,)``; all lie where
        the inner inferer's logits do, in float32 where these have 16 bits.

        Args:
            inputs: ``(B, in_channels, *spatial)``.
            network: a `MedNCA`, possibly wrapped.
            args: handed on to the inner inferer.
            kwargs: handed on to the inner inferer.

        Raises:
            ValueError: where ``inputs`` holds NaN or infinite values.
        """
        check_finite("inputs", inputs)
        mean, squares = torch.zeros(()), torch.zeros(())
        for run in range(self.num_runs):
            logits = self.inferer(inputs, SeededNetwork(network, run), *args, **kwargs)
            logits = convert_to_tensor(logits, track_meta=False)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # for the sums
            channels = logits.shape[1]
            if channels == 1:
                values = logits.sigmoid()
            else:  # a sum, as 1 - P(background) rounds to 0 where that is nearly certain
                values = logits.softmax(1)
                values = torch.cat([values, values[:, 1:].sum(1, keepdim=True)], 1)
            change = values - mean
            mean = mean + change / (run + 1)
            squares = squares + change * (values - mean)
        std = (squares / self.num_runs).sqrt()
        total = mean[:, -1].flatten(1).sum(1).clamp_min(torch.finfo(mean.dtype).tiny)
        return {
            "mean": with_meta(mean[:, :channels], inputs),
            "std": with_meta(std[:, :channels], inputs),
            "nqm": std[:, -1].flatten(1).sum(1) / total,
        }


class SeededNetwork:
    """A network whose every image gets the same seed; inferers may treat it as the network."""

    def __init__(self, network: Callable[..., Tensor], seed: int) -> None:
        self.network = network
        self.seed = seed

    def __call__(self, image: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Call the network with the seed, in place of any other."""
        seed = torch.full((len(image),), self.seed, dtype=torch.int64, device=image.device)
        return self.network(image, *args, **{**kwargs, "seed": seed})

    def __getattr__(self, name: str) -> object:
        """Everything else is the network's."""
        return getattr(self.network, name)


def unwrapped(network: Callable[..., Tensor]) -> MedNCA:
    """The `MedNCA` itself, whatever wraps it for distributed training."""
    return cast(MedNCA, getattr(network, "module", network))
