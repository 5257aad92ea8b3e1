"""Checks of what a bundle reads, MONAI's resampling made safe, and a writer of whole files."""

import gzip
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection, PathLike
from monai.data.image_writer import ImageWriter, NibabelWriter
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms.io.array import LoadImage
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.spatial.dictionary import Spacingd
from monai.transforms.transform import MapTransform
from monai.utils.misc import ensure_tuple
from monai.utils.type_conversion import convert_to_numpy, convert_to_tensor
from torch import Tensor

from mednca_monai.checks import check_classes, check_finite, is_number
from mednca_monai.files import whole_file


def check_gzip(path: PathLike) -> None:
    """Raise an error where a ``.gz`` file breaks its checksum, before which nibabel stops reading.

    Raises:
        EOFError: where its end is missing.
        OSError: where its start or checksum is wrong.
        zlib.error: where its code is wrong.
    """
    if str(path).lower().endswith(".gz") and os.path.isfile(path):
        with gzip.open(path) as file:
            while file.read(2**20):
                pass


class LoadImageNaming(LoadImage):
    """``LoadImage`` whose errors name the file, and that sees where a ``.gz`` file is corrupt."""

    def __call__(self, filename: Any, reader: Any = None) -> Any:
        """Load a file.

        Raises:
            ValueError: where it cannot be read.
        """
        try:
            for name in ensure_tuple(filename):
                check_gzip(name)
            return super().__call__(filename, reader)
        except Exception as error:
            text = str(error) or type(error).__name__
            raise ValueError(f"'{filename}' must be a readable image, got: {text}") from error


class LoadImageNamingd(LoadImaged):
    """``LoadImaged`` whose errors name the file that cannot be read.

    The Deploy App SDK, which reads images itself, drops transforms whose names begin as this one.

    Args:
        keys: of paths.
        reader: as of ``LoadImaged``.
    """

    def __init__(self, keys: KeysCollection, reader: Any = None) -> None:
        super().__init__(keys)
        self._loader = LoadImageNaming(reader)


class CheckImaged(MapTransform):
    """Pass images on that a network can segment: right axes and channels, finite, not flat, placed.

    An image is flat where the 0.5th and 99.5th percentile of a channel are the same: what the
    bundle scales intensities by. It is placed where its affine can be inverted. A message names the
    file of the image.

    Args:
        keys: of channel-first images, ``(C, *spatial)``.
        spatial_dims: number of spatial axes they must have.
        in_channels: number of channels they must have.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int, in_channels: int) -> None:
        super().__init__(keys)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return ``data`` unchanged.

        Raises:
            ValueError: where an image breaks a rule.
        """
        for key in self.key_iterator(dict(data)):
            image = data[key]
            name = getattr(image, "meta", {}).get("filename_or_obj", key)
            shape = list(image.shape)
            if image.dim() != self.spatial_dims + 1:
                axes = f"{self.spatial_dims} spatial axes"
                raise ValueError(f"`{key}` must have {axes}, got {shape[1:]} in '{name}'.")
            if image.numel() == 0:
                raise ValueError(f"`{key}` must not be empty, got {shape} in '{name}'.")
            if len(image) != self.in_channels:
                raise ValueError(
                    f"`{key}` must have {self.in_channels} channels, got {len(image)} in '{name}'."
                )
            check_finite(str(key), image, f" in '{name}'")
            low, high = np.percentile(convert_to_numpy(image.flatten(1)), [0.5, 99.5], 1)
            if (low == high).any():
                raise ValueError(
                    f"`{key}` must vary between its 0.5th and 99.5th percentile, "
                    f"got {float(low[low == high][0])} for both in '{name}'."
                )
            affine = image.affine if isinstance(image, MetaTensor) else torch.eye(1)
            if not bool(affine.det().abs() > 0):
                raise ValueError(
                    f"`{key}` must have an affine that can be inverted, got {affine.tolist()} "
                    f"in '{name}'."
                )
        return dict(data)


class CheckLabeld(MapTransform):
    """Pass labels on that fit their image: its size and affine, and class numbers only.

    Args:
        keys: of labels, ``(1, *spatial)``.
        image_key: of the image, ``(C, *spatial)``.
        out_channels: number of classes, background included.
    """

    def __init__(self, keys: KeysCollection, image_key: str, out_channels: int) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.out_channels = out_channels

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return ``data`` unchanged.

        Raises:
            ValueError: where a label breaks a rule.
        """
        for key in self.key_iterator(dict(data)):
            label = data[key]
            name = getattr(label, "meta", {}).get("filename_or_obj", key)
            image = data[self.image_key]
            shape = [1, *image.shape[1:]]
            if list(label.shape) != shape:
                found = f"{list(label.shape)} in '{name}'"
                raise ValueError(f"`{key}` must have the image's size, {shape}, got {found}.")
            if isinstance(label, MetaTensor) and isinstance(image, MetaTensor):
                apart = (label.affine - image.affine).abs().max().item()
                if not apart < 1e-3:
                    raise ValueError(
                        f"`{key}` must have the image's affine, got one that differs by "
                        f"{apart:.3g} in '{name}'."
                    )
            check_classes(str(key), label, self.out_channels, f" in '{name}'")
        return dict(data)


class ResampleSpacingd(Spacingd):
    """``Spacingd`` that sees its keys only.

    The stock one of MONAI 1.6 takes the value of every key that starts with ``image_``, such as
    ``image_path``, for meta data of ``image`` and fails on a string. Arguments are those of
    ``monai.transforms.Spacingd``.

    Raises:
        ValueError: where ``pixdim`` is not three numbers above 0.
    """

    def __init__(self, keys: KeysCollection, pixdim: Sequence[float], **arguments: Any) -> None:
        sizes = pixdim if isinstance(pixdim, Sequence) else []
        if len(sizes) != 3 or not all(is_number(n) and n > 0 for n in sizes):
            raise ValueError(f"`pixdim` must be 3 numbers above 0, got {pixdim!r}.")
        super().__init__(keys, pixdim, **arguments)

    def __call__(
        self, data: Mapping[Hashable, Tensor], lazy: bool | None = None
    ) -> dict[Hashable, Tensor]:
        """Return ``data`` with its keys resampled.

        Raises:
            ValueError: where the voxels of one are over a hundred times larger or smaller than
                ``pixdim``, as those of a header in the wrong unit.
        """
        own = {key: data[key] for key in self.key_iterator(dict(data))}
        pixdim = self.spacing_transform.pixdim
        for key, image in own.items():
            image = convert_to_tensor(image, track_meta=True)
            sizes = convert_to_numpy(affine_to_spacing(image.affine))
            if not all(0.01 <= n <= 100 for n in sizes / pixdim):
                raise ValueError(
                    f"`{key}` must have voxels of a hundredth to a hundred times `pixdim`, "
                    f"{pixdim.tolist()}, got {sizes.tolist()} in "
                    f"'{image.meta.get('filename_or_obj', key)}'."
                )
        return {**data, **super().__call__(own, lazy)}


class VolumeWriter(NibabelWriter):
    """Write NIfTI volumes whole or not at all, never over their image, and in their own shape.

    The stock writer drops a last axis of length 1.
    """

    source: PathLike = ""

    def set_metadata(
        self, meta_dict: Mapping[Any, Any] | None = None, resample: bool = True, **options: Any
    ) -> None:
        """Set them as the stock writer does, and note the image's file."""
        super().set_metadata(meta_dict, resample, **options)
        self.source = (meta_dict or {}).get("filename_or_obj") or ""

    def write(self, filename: PathLike, verbose: bool = False, **options: Any) -> None:
        """Write the file; the arguments are those of the stock writer.

        Raises:
            OSError: where that fails; a file of that name stays as it was.
            ValueError: where it is the image's file.
        """
        if os.path.exists(filename) and os.path.realpath(filename) == os.path.realpath(self.source):
            raise ValueError(f"`output_postfix` must keep the image, got its file '{filename}'.")
        ImageWriter.write(self, filename, verbose)  # logs the name
        with whole_file(filename) as part:
            super().write(part, **options)

    @classmethod
    def convert_to_channel_last(
        cls,
        data: Any,
        channel_dim: int | Sequence[int] | None = 0,
        squeeze_end_dims: bool = True,
        spatial_ndim: int | None = 3,
        contiguous: bool = False,
    ) -> Any:
        """Move the channels last as the stock writer does, and drop that axis alone if it is 1."""
        moved = super().convert_to_channel_last(data, channel_dim, False, spatial_ndim, contiguous)
        return moved[..., 0] if squeeze_end_dims and moved.shape[-1] == 1 else moved
