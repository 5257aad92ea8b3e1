"""Checks of what a bundle reads, MONAI's resampling made safe, and a writer that keeps shapes."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config.type_definitions import KeysCollection
from monai.data.image_writer import NibabelWriter
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import Spacingd
from monai.transforms.transform import MapTransform
from torch import Tensor


class CheckImaged(MapTransform):
    """Pass images on that a network can segment: right axes and channels, finite, not empty.

    A message names the file of the image.

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
            if not bool(image.isfinite().all()):
                count = int((~image.isfinite()).sum())
                raise ValueError(
                    f"`{key}` must be finite, got {count} NaN or infinite values in '{name}'."
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
            known = (label >= 0) & (label < self.out_channels) & (label == label.round())
            if not bool(known.all()):
                raise ValueError(
                    f"`{key}` must hold integers from 0 to {self.out_channels - 1}, "
                    f"got {float(label[~known][0])} in '{name}'."
                )
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
        if len(pixdim) != 3 or not all(0 < size < float("inf") for size in pixdim):
            raise ValueError(f"`pixdim` must be 3 numbers above 0, got {pixdim!r}.")
        super().__init__(keys, pixdim, **arguments)

    def __call__(
        self, data: Mapping[Hashable, Tensor], lazy: bool | None = None
    ) -> dict[Hashable, Tensor]:
        """Return ``data`` with its keys resampled."""
        own = {key: data[key] for key in self.key_iterator(dict(data))}
        return {**data, **super().__call__(own, lazy)}


class VolumeWriter(NibabelWriter):
    """Write NIfTI volumes in their own shape; the stock writer drops a last axis of length 1."""

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
