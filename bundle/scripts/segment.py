"""Segment a NIfTI volume with numpy and nibabel alone, as the bundle's inference does.

For computers too small for torch; Python 3.10 or later. Reads the bundle's own weights and
settings (3-D, dense perception, independent firing, no normalisation). Weights that end in .onnx
are run by onnxruntime instead. Of an oblique scan whose voxels are not 1 mm, MONAI's resampling
may align the centres instead of the first voxels; some labels at borders differ then.

Run: python scripts/segment.py image.nii.gz segmentation.nii.gz [--weights models/model.pt]
"""

import argparse
import gzip
import json
import os
import pickle
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
IMAGE_ERRORS = (OSError, EOFError, MemoryError, OverflowError, TypeError, ValueError, zlib.error)
IMAGE_ERRORS += (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)
WEIGHTS_ERRORS = (AttributeError, EOFError, KeyError, TypeError, zipfile.BadZipFile)
WEIGHTS_ERRORS += (pickle.UnpicklingError,)
BUNDLE = Path(__file__).resolve().parents[1]
CELLS = 1024  # updated together; their neighbourhoods are about 1 MB
DEFAULTS = {"fire_rate": 0.5, "firing": "independent", "num_levels": 2, "scale_factor": 4}
DEFAULTS |= {"perception": "dense", "norm": None, "kernel_size": 3}


def read_weights(path: Path, settings: dict[str, Any]) -> dict[str, Array]:
    """Arrays of a network's weights that ``torch.save`` wrote; nothing in the file is executed.

    Raises:
        ValueError: where the file holds anything else, or weights of another network.
    """
    try:
        weights = unpickle(path)
    except WEIGHTS_ERRORS as error:
        raise ValueError(f"'{path}' must be weights saved by torch, got: {error!r}.") from error
    channels, hidden = settings["num_channels"], settings["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for level in range(settings["num_levels"]):
        shapes |= {
            f"levels.{level}.perception.weight": (2 * channels, channels, 3, 3, 3),
            f"levels.{level}.perception.bias": (2 * channels,),
            f"levels.{level}.hidden.weight": (hidden, 3 * channels, 1, 1, 1),
            f"levels.{level}.hidden.bias": (hidden,),
            f"levels.{level}.update.weight": (channels, hidden, 1, 1, 1),
        }
    found = {name: getattr(weight, "shape", None) for name, weight in weights.items()}
    if found != shapes:
        raise ValueError(f"'{path}' must hold weights of shapes {shapes}, got {found}.")
    return weights


def unpickle(path: Path) -> dict[str, Array]:
    """The dictionary in a file of ``torch.save``."""
    with zipfile.ZipFile(path) as file:
        indices = [name for name in file.namelist() if name.endswith("/data.pkl")]
        if len(indices) != 1:
            raise ValueError(f"'{path}' must be weights saved by torch, got a zip file of others.")
        (index,) = indices
        folder = index.removesuffix("data.pkl")

        def rebuild(storage: Array, offset: int, size: Any, stride: Any, *_: object) -> Array:
            count = int(np.prod(size))
            dense = [int(np.prod(size[axis + 1 :])) for axis in range(len(size))]
            if list(stride) != dense or not 0 <= offset <= len(storage) - count:
                raise ValueError(f"'{path}' must hold whole tensors, got {size}, {stride}.")
            return storage[offset : offset + count].reshape(size)

        class Reader(pickle.Unpickler):
            """Knows tensors of floats and ordered dictionaries, and refuses everything else."""

            def find_class(self, module: str, name: str) -> Any:
                known = {
                    "torch._utils._rebuild_tensor_v2": rebuild,
                    "torch.FloatStorage": np.float32,
                    "collections.OrderedDict": OrderedDict,
                }
                if f"{module}.{name}" not in known:
                    raise ValueError(f"'{path}' must hold float tensors, got {module}.{name}.")
                return known[f"{module}.{name}"]

            def persistent_load(self, pid: Any) -> Array:
                return np.frombuffer(file.read(f"{folder}data/{pid[2]}"), pid[1])

        return dict(Reader(file.open(index)).load())


def read_settings() -> dict[str, Any]:
    """Settings of the network and the spacing of its voxels, from ``configs/inference.json``.

    Raises:
        ValueError: where the network has parts that are not written here.
    """
    config = json.loads((BUNDLE / "configs" / "inference.json").read_text(encoding="utf-8"))
    settings = {**DEFAULTS, **config["network_def"], "spacing": config["spacing"]}
    settings |= {name: config[name] for name in ("in_channels", "out_channels")}
    for name in ("firing", "perception", "norm", "kernel_size"):
        if settings[name] != DEFAULTS[name]:
            raise ValueError(f"`{name}` must be {DEFAULTS[name]!r}, got {settings[name]!r}.")
    return settings


def absorb(digest: Array, word: Array | int) -> Array:
    """As ``mednca_monai.firing.absorb``, in unsigned 32-bit arithmetic."""
    x = (digest ^ np.asarray(word, np.uint32)) + np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def fires(level: int, step: int, shape: tuple[int, ...], threshold: int) -> Array:
    """Which cells fire, for the seed 0 (two words of zeros)."""
    digest = np.zeros(1, np.uint32)
    for word in (0, 0, level, step):
        digest = absorb(digest, word)
    for axis, length in enumerate(shape):
        digest = absorb(digest.reshape((*digest.shape[:axis], 1)), np.arange(length))
    return digest < threshold


def read_rule(weights: dict[str, Array], level: int) -> tuple[Array, ...]:
    """Perception ``(27 * C, 2 * C)``, hidden layer ``(3 * C, hidden)``, its bias, last layer."""
    perception, bias, hidden, hidden_bias, update = (
        weights[f"levels.{level}.{name}"]
        for name in (
            "perception.weight", "perception.bias", "hidden.weight", "hidden.bias", "update.weight",
        )
    )  # fmt: skip
    hidden, update = hidden[:, :, 0, 0, 0].T, update[:, :, 0, 0, 0].T
    bias = hidden_bias + bias @ hidden[-len(bias) :]
    return perception.transpose(2, 3, 4, 1, 0).reshape(-1, len(perception)), hidden, bias, update


def run_level(image: Array, cells: Array, rule: tuple[Array, ...], fired: Any) -> Array:
    """Cells' own channels after all steps, both ``(*spatial, channels)``."""
    perception, hidden, bias, update = rule
    channels, known = update.shape[1], image.shape[-1]
    width = [(1, 1)] * 3 + [(0, 0)]
    padded_shape = [n + 2 for n in image.shape[:3]]
    around_first = np.ravel_multi_index(np.indices([3] * 3).reshape(3, -1), padded_shape)
    state = np.concatenate([image, cells], -1)
    for mask in fired:
        padded = np.pad(state, width, mode="reflect").reshape(-1, channels)
        places = np.nonzero(mask)
        first = np.ravel_multi_index(places, padded_shape)
        change = np.empty((len(first), channels - known), np.float32)
        for i in range(0, len(first), CELLS):
            around = padded[first[i : i + CELLS, None] + around_first]
            perceived = around.reshape(len(around), -1) @ perception
            x = np.concatenate([around[:, 13], perceived], -1) @ hidden + bias  # 13: the cell
            change[i : i + CELLS] = np.maximum(x, 0, out=x) @ update[:, known:]
        state[(*places, slice(known, None))] += change
    return state[..., known:]


def reduce(image: Array, factor: list[int]) -> Array:
    """Mean of blocks of cells; blocks at the end may be smaller."""
    for axis, n in enumerate(factor):
        first = np.arange(0, image.shape[axis], n)
        counts = np.diff(np.append(first, image.shape[axis]))
        shape = [-1 if a == axis else 1 for a in range(image.ndim)]
        image = np.add.reduceat(image, first, axis) / counts.reshape(shape).astype(np.float32)
    return image


def segment(image: Array, weights: dict[str, Array], settings: dict[str, Any]) -> Array:
    """Logits ``(*spatial, out_channels)`` of an image ``(*spatial, in_channels)``."""
    levels, factor = settings["num_levels"], settings["scale_factor"]
    factor = factor if isinstance(factor, list) else [factor] * 3
    steps = settings["steps"]
    steps = steps if isinstance(steps, list) else [steps] * levels
    threshold = round(settings["fire_rate"] * 2**32)
    images = [image]
    for _ in range(levels - 1):
        images.insert(0, reduce(images[0], factor))
    own = weights["levels.0.update.weight"].shape[0] - image.shape[-1]
    cells = np.zeros((*images[0].shape[:3], own), np.float32)
    for level, reduced in enumerate(images):
        shape = reduced.shape[:3]
        if level > 0:
            for axis, n in enumerate(factor):
                cells = cells.repeat(n, axis).take(range(shape[axis]), axis)
        fired = (fires(level, step, shape, threshold) for step in range(steps[level]))
        cells = run_level(reduced, cells, read_rule(weights, level), fired)
    return cells[..., : settings["out_channels"]]


def segment_by_onnx(image: Array, path: Path) -> Array:
    """As `segment`, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.moveaxis(image, -1, 0)[None]})
    return np.moveaxis(logits[0], 0, -1)


def resample(image: Array, places: list[Array]) -> Array:
    """Linear interpolation of ``(*spatial, channels)`` at positions along each axis."""
    for axis, place in enumerate(places):
        last = image.shape[axis] - 1
        place = place.clip(0, last)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, last)
        share = (place - below).astype(np.float32)
        share = share.reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        image = image.take(below, axis) * (1 - share) + image.take(above, axis) * share
    return image


def read_scan(path: str, in_channels: int) -> tuple[Array, Array]:
    """Volume ``(*spatial, in_channels)`` and affine of a NIfTI file.

    Raises:
        ValueError: where there is none that can be segmented.
    """
    try:
        if path.lower().endswith(".gz"):
            with gzip.open(path) as file:
                while file.read(2**20):
                    pass  # to its checksum, before which nibabel stops
        scan = nib.load(path)
        volume = np.asarray(scan.dataobj, np.float32)
    except FileNotFoundError:
        raise
    except IMAGE_ERRORS as error:
        raise ValueError(f"'{path}' must be a NIfTI volume, got: {error!r}.") from error
    if volume.ndim == 3:
        volume = volume[..., None]
    if volume.ndim != 4 or volume.shape[3] != in_channels or not volume.size:
        raise ValueError(f"'{path}' must be one volume, got shape {list(scan.shape)}.")
    if not np.isfinite(volume).all():
        raise ValueError(f"'{path}' must be finite, got NaN or infinite values.")
    sizes = nib.affines.voxel_sizes(scan.affine)
    axes = scan.affine[:3, :3] / sizes
    apart = np.abs(axes.T @ axes - np.eye(3)).max()
    if not (apart < 1e-3 and np.isfinite(scan.affine).all()):
        raise ValueError(
            f"'{path}' must have an affine with orthogonal axes, got {scan.affine.tolist()}."
        )
    zooms = scan.header.get_zooms()[:3]
    if not np.allclose(sizes, zooms, rtol=1e-3):
        raise ValueError(
            f"'{path}' must have an affine of its voxel sizes, {zooms}, got {sizes.tolist()}."
        )
    return volume, scan.affine


def check_target(source: str, target: str) -> None:
    """Raise ValueError where a segmentation cannot be written, before any work is done."""
    if not target.endswith((".nii", ".nii.gz")):
        raise ValueError(f"`segmentation` must end in .nii or .nii.gz, got '{target}'.")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(target))).close()
        if os.path.isdir(target):
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise ValueError(
            f"`segmentation` must be a file in a folder to write to, got '{target}': {error}."
        ) from error
    if os.path.exists(target) and os.path.samefile(source, target):
        raise ValueError(f"`segmentation` must be another file than `image`, got '{target}'.")


def main(source: str, target: str, weights_file: Path) -> None:
    """Segment a file and write the label map in the same space."""
    check_target(source, target)
    settings = read_settings()
    volume, affine = read_scan(source, settings["in_channels"])
    turn = nib.io_orientation(affine)
    image = nib.apply_orientation(volume, turn)
    low, high = np.percentile(image, [0.5, 99.5], (0, 1, 2))
    if (low == high).any():
        raise ValueError(
            f"'{source}' must vary between its 0.5th and 99.5th percentile, got {low}."
        )
    image = ((image - low) / (high - low)).clip(0, 1).astype(np.float32)
    order = np.argsort(turn[:, 0])
    spacing = nib.affines.voxel_sizes(affine)[order] / settings["spacing"]
    if not ((spacing >= 0.01) & (spacing <= 100)).all():
        raise ValueError(
            f"'{source}' must have voxels of a hundredth to a hundred times {settings['spacing']}, "
            f"got {(spacing * settings['spacing']).tolist()}."
        )
    shape = image.shape[:3]
    size = [round((n - 1) * step + 1) for n, step in zip(shape, spacing, strict=True)]
    axes = affine[:3, order]
    close = np.allclose(axes, axes / spacing, atol=1e-3) or np.allclose(1 / spacing, 1, atol=1e-3)
    if close and size == list(shape):
        spacing = np.ones(3)  # as MONAI leaves such a scan
    image = resample(image, [np.arange(n) / step for n, step in zip(size, spacing, strict=True)])
    if weights_file.suffix == ".onnx":
        logits = segment_by_onnx(image, weights_file)
    else:
        logits = segment(image, read_weights(weights_file, settings), settings)
    if not np.isfinite(logits).all():
        raise ValueError(f"'{weights_file}' must give finite logits of '{source}'.")
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    shares = resample(shares, [np.arange(n) * s for n, s in zip(shape, spacing, strict=True)])
    labels = shares.argmax(-1).astype(np.uint8)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    labels = nib.apply_orientation(labels, back)
    result = nib.Nifti1Image(labels, affine)
    folder, name = os.path.split(os.path.abspath(target))
    temporary = os.path.join(folder, f".{os.getpid()}_{name}")
    try:
        nib.save(result, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"'{target}' could not be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("image")
    parser.add_argument("segmentation")
    parser.add_argument("--weights", type=Path, default=BUNDLE / "models" / "model.pt")
    given = parser.parse_args()
    main(given.image, given.segmentation, given.weights)
