"""Pictures of segmentations, to look at them without a viewer."""

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection, NdarrayOrTensor
from monai.data.folder_layout import FolderLayout, default_name_formatter
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Orientation
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_numpy
from numpy.typing import NDArray
from PIL import Image

from mednca_monai.checks import check_int
from mednca_monai.files import whole_file

HEIGHT = 200  # of a slice in pixels, at least
COLOURS = np.array(  # of Okabe and Ito, which colour-blind people can tell apart
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [213, 94, 0], [204, 121, 167]],
    np.uint8,
)


def outlines(label: NDArray[Any], width: int = 2) -> NDArray[np.bool_]:
    """Cells of a 2-D label map's classes that are within ``width`` cells of another class."""
    padded = np.pad(label, width)
    edge = np.zeros(label.shape, bool)
    for shift in range(-width, width + 1):
        for row, column in ((shift, 0), (0, shift)):
            moved = padded[width + row :, width + column :][: label.shape[0], : label.shape[1]]
            edge |= moved != label
    return edge & (label > 0)


def overlay_picture(
    image: NdarrayOrTensor,
    segmentation: NdarrayOrTensor,
    axis: int = 0,
    count: int = 5,
    spacing: float | Sequence[float] = 1.0,
) -> NDArray[np.uint8]:
    """Draw slices of an image side by side, with the segmentation's classes outlined.

    The slices are spread evenly over those that hold foreground, or over all if none does. In each
    the last axis points up and the other to the right: superior and anterior in a sagittal slice of
    a volume in RAS. A volume of one slice is shown along that slice's axis. A 2-D image, ``(x, y)``
    as MONAI reads pictures, has y point down.

    Args:
        image: ``spatial``, 2-D or 3-D; its 1st to 99th percentile is shown from black to white.
        segmentation: label map of the same shape, 0 is background.
        axis: along which a volume is sliced.
        count: number of slices, at least 1; fewer where fewer hold foreground.
        spacing: size of a voxel in any unit; one value or one per axis.

    Returns:
        RGB, ``(height, width, 3)``; voxels are enlarged by integers, to slices of about 200 pixels
        or more in height.

    Raises:
        ValueError: where the shapes differ or are not 2-D or 3-D, or ``count`` is below 1.
    """
    volume: NDArray[np.float32] = convert_to_numpy(image).astype(np.float32)
    label: NDArray[np.int32] = convert_to_numpy(segmentation).astype(np.int32)
    if volume.shape != label.shape or volume.ndim not in (2, 3):
        raise ValueError(
            f"`segmentation` must be 2-D or 3-D and have the image's shape, {volume.shape}, "
            f"got {label.shape}."
        )
    sizes = np.broadcast_to(spacing, volume.ndim)
    if volume.ndim == 2:
        volume, label, sizes = volume[:, ::-1, None], label[:, ::-1, None], np.append(sizes, 1)
    axis = volume.shape.index(1) if 1 in volume.shape else axis
    width, height = np.delete(sizes, axis) / np.delete(sizes, axis).min()
    black, white = np.percentile(volume, [1, 99])
    volume, label = np.moveaxis(volume, axis, 0), np.moveaxis(label, axis, 0)

    shown = np.flatnonzero(label.any((1, 2)))
    shown = shown if len(shown) else np.arange(len(label))
    count = min(check_int("count", count, 1), len(shown))
    shown = shown[((np.arange(count) + 0.5) * len(shown) / count).astype(int)]
    shades = ((volume[shown] - black) * 255 / (white - black or 1)).clip(0, 255).astype(np.uint8)

    factor = np.ceil(HEIGHT / (volume.shape[2] * height))
    pictures = []
    for slices in zip(shades, label[shown], strict=True):
        grey, classes = (
            np.rot90(x).repeat(round(height * factor), 0).repeat(round(width * factor), 1)
            for x in slices
        )
        picture = np.stack([grey] * 3, -1)
        edge = outlines(classes)
        picture[edge] = COLOURS[(classes[edge] - 1) % len(COLOURS)]
        pictures.append(picture)
    return np.concatenate(pictures, 1)


class SaveImageOverlayd(MapTransform):
    """Write one PNG per case that shows its segmentation, see `overlay_picture`.

    Volumes that know their affine are shown in RAS, with their spacing. Files are named as
    ``SaveImaged`` names them, after the image's file, and appear once complete.

    Args:
        keys: of the segmentation, a label map ``(1, *spatial)``.
        image_key: of the image in the same space, ``(C, *spatial)``; its first channel is shown.
        output_dir: folder to write to; made if needed.
        output_postfix: of the file's name.
        separate_folder: whether each case has its own folder.
        axis: along which the volume is sliced; 0 gives sagittal slices, 1 coronal, 2 axial ones.

    Raises:
        ValueError: where ``keys`` are several, which would all have the same file, or ``axis`` is
            another.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str,
        output_dir: str | os.PathLike[str],
        output_postfix: str = "overlay",
        separate_folder: bool = True,
        axis: int = 0,
    ) -> None:
        super().__init__(keys)
        if len(self.keys) > 1:
            raise ValueError(f"`keys` must be one key, got {self.keys!r}.")
        if axis not in (0, 1, 2):
            raise ValueError(f"`axis` must be 0, 1 or 2, got {axis!r}.")
        self.image_key = image_key
        self.axis = axis
        self.layout = FolderLayout(
            output_dir, output_postfix, "png", parent=separate_folder, makedirs=True
        )
        self._data_index = 0  # MONAI's name of a case without a file's name

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Write the picture of ``data`` and return ``data`` itself.

        Raises:
            ValueError: where the segmentation has several channels or another shape than the image.
        """
        image, segmentation = data[self.image_key][:1], data[self.keys[0]]
        if len(segmentation) != 1:
            raise ValueError(
                f"`{self.keys[0]}` must be a label map of 1 channel, got {len(segmentation)}."
            )
        spacing = 1.0
        if isinstance(image, MetaTensor):
            if image.ndim == 4:
                to_ras = Orientation("RAS", labels=None)
                segmentation = to_ras(MetaTensor(segmentation, meta=image.meta))
                image = to_ras(image)
            spacing = image.pixdim.tolist()[: image.ndim - 1]  # MONAI 1.5 gives a 2-D image 3
        picture = overlay_picture(image[0], segmentation[0], self.axis, spacing=spacing)
        name = default_name_formatter(getattr(image, "meta", {}), self)
        self._data_index += 1
        path = str(self.layout.filename(**name))
        with whole_file(path) as part:
            Image.fromarray(picture).save(part)
        return data
