"""The bundle's inference on files as they come: all kinds of volumes, and broken ones."""

import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

BUNDLE = Path(__file__).parents[1] / "bundle"
PERMUTATIONS = ("RAS", "RSA", "ARS", "ASR", "SRA", "SAR")
FLIPS = ("LAS", "RPS", "RAI", "LPI", "PIL")


def segment(datalist, output, ckpt_path=BUNDLE / "models" / "model.pt"):
    """Run the shipped bundle in this process."""
    parser = ConfigParser(json.loads((BUNDLE / "configs" / "inference.json").read_text()))
    settings = {"bundle_root": str(BUNDLE), "output_dir": str(output), "device": "cpu"}
    parser.update({**settings, "datalist": datalist, "ckpt_path": str(ckpt_path)})
    parser.get_parsed_content("inference")


def segmentation(output, name):
    return nibabel.load(output / "segmentations" / name / f"{name}_seg.nii.gz")


def voxels(image):
    return np.asarray(image.dataobj)


def save(volume, affine, path):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def turned(affine, degrees, axis):
    """The affine of a scan whose box is rotated around an axis of the scanner."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.eye(4)
    first, second = (a for a in range(3) if a != axis)
    rotation[[first, second], [first, second]] = c
    rotation[first, second], rotation[second, first] = -s, s
    return rotation @ affine


def finer(volume, affine, axis):
    """Twice as many voxels along an axis, by linear interpolation."""
    between = (volume.take(range(1, volume.shape[axis]), axis) * 0.5) + (
        volume.take(range(volume.shape[axis] - 1), axis) * 0.5
    )
    size = [n + (n - 1) * (a == axis) for a, n in enumerate(volume.shape)]
    fine = np.empty(size, np.float32)
    index = [slice(None)] * 3
    for first, part in ((0, volume), (1, between)):
        index[axis] = slice(first, None, 2)
        fine[tuple(index)] = part
    return fine, affine @ np.diag([0.5 if a == axis else 1 for a in range(4)])


@pytest.fixture(scope="module")
def scan(shared):
    """A part of a real volume, as float32, and its affine."""
    path = shared / "data" / "Task04_Hippocampus" / "imagesTr" / "hippocampus_001.nii.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    image = nibabel.load(path)
    return voxels(image)[6:30, 8:42, 6:28].astype(np.float32), image.affine


def views(volume, affine):
    """The same scan in other files: volume, affine, and what turns the segmentation back."""
    yield "plain", volume, affine, None
    for axcodes in (*PERMUTATIONS[1:], *FLIPS):
        turn = ornt_transform(nibabel.io_orientation(affine), axcodes2ornt(axcodes))
        back = ornt_transform(axcodes2ornt(axcodes), nibabel.io_orientation(affine))
        yield (
            axcodes,
            apply_orientation(volume, turn),
            affine @ inv_ornt_aff(turn, volume.shape),
            lambda found, back=back: apply_orientation(found, back),
        )
    for degrees, axis in ((20, 2), (44, 0)):
        yield f"rotated_{degrees}", volume, turned(affine, degrees, axis), None
    yield "rotated_twice", volume, turned(turned(affine, 30, 0), 25, 1), None
    for dtype in (np.int16, np.uint8, np.float64):
        yield dtype.__name__, volume.astype(dtype), affine, None
    yield "scaled", volume * 0.01 - 3, affine, None
    yield "four_axes", volume[..., None], affine, None
    for axis in range(3):
        yield (
            f"finer_{axis}",
            *finer(volume, affine, axis),
            lambda found, axis=axis: found.take(range(0, found.shape[axis], 2), axis),
        )


@pytest.fixture(scope="module")
def found(scan, tmp_path_factory):
    """Segmentations of all views of a scan, by name, in the space of the plain one."""
    folder = tmp_path_factory.mktemp("views")
    for name, volume, affine, _ in views(*scan):
        save(volume, affine, folder / f"{name}.nii.gz")
    save(*scan, folder / "uncompressed.nii")
    slope = nibabel.Nifti1Image(scan[0] * 2.5 - 100, scan[1])
    slope.header.set_slope_inter(2.5, -100)
    slope.set_data_dtype(np.int16)
    nibabel.save(slope, folder / "slope.nii.gz")
    for axis in range(3):
        save(scan[0].take([12], axis), scan[1], folder / f"slice_{axis}.nii.gz")
    save(scan[0][9:14, 10:13, 9:11], scan[1], folder / "tiny.nii.gz")
    segment(str(folder), folder)

    backs = {name: back for name, *_, back in views(*scan)}
    results = {}
    for path in sorted(folder.glob("*.nii*")):
        name = path.name.partition(".")[0]
        image, result = nibabel.load(path), segmentation(folder, name)
        assert result.shape == image.shape[:3]
        np.testing.assert_allclose(result.affine, image.affine, rtol=0, atol=1e-5)
        results[name] = (backs.get(name) or np.asarray)(voxels(result))
    return results


def test_a_scan_has_the_same_segmentation_however_it_is_stored(scan, found):
    plain = found["plain"]
    assert all((plain == part).sum() > 500 for part in (1, 2))
    scores = {}
    for name in [name for name, *_ in views(*scan)] + ["uncompressed", "slope"]:
        for part in (1, 2):
            one, other = found[name] == part, plain == part
            scores[f"{name} {part}"] = 2 * (one & other).sum() / (one.sum() + other.sum())
    assert {name: score for name, score in scores.items() if not score >= 0.99} == {}


def test_axes_in_another_order_or_direction_change_nothing(found):
    for axcodes in (*PERMUTATIONS[1:], *FLIPS, "rotated_20", "four_axes", "uncompressed"):
        np.testing.assert_array_equal(found[axcodes], found["plain"], axcodes)


BROKEN = {
    "cut.nii.gz": "must be a readable image, got: Compressed file ended before",
    "short.nii": "must be a readable image, got: Expected 1920 bytes",
    "text.nii.gz": "must be a readable image, got: Not a gzipped file",
    "empty.nii.gz": "must be a readable image, got: Empty file",
    "missing.nii.gz": "must be a readable image, got: No such file",
    "folder.nii.gz": "must be a readable image, got: Could not read file",
    "unknown.xyz": "must be a readable image, got: .*cannot find a suitable reader",
    "zeros.nii.gz": r"must vary between its 0.5th and 99.5th percentile, got 0\.0 for both",
    "nan.nii.gz": "must be finite, got 1 NaN or infinite values",
    "channels.nii.gz": "must have 1 channels, got 2",
    "flat.nii.gz": r"must have 3 spatial axes, got \[10, 12\]",
    "no_place.nii": "must have an affine that can be inverted",
    "full.nii.gz": r"full_seg.nii.gz' could not be written: \[Errno 28\] No space left on device",
}
GOOD = ["a file äöü 心.nii.gz", "$print(1).nii.gz", "@device.nii.gz"]


def write_broken(folder):
    """Files of the names above."""
    volume = np.random.default_rng(0).normal(50, 10, (10, 12, 8)).astype(np.int16)
    for name in (*GOOD, "whole.nii", "full.nii.gz"):
        save(volume, np.eye(4), folder / name)
    whole = (folder / "whole.nii").read_bytes()
    (folder / "whole.nii").unlink()
    (folder / "short.nii").write_bytes(whole[:1000])
    (folder / "no_place.nii").write_bytes(whole[:280] + bytes(48) + whole[328:])
    (folder / "cut.nii.gz").write_bytes((folder / GOOD[0]).read_bytes()[:900])
    (folder / "text.nii.gz").write_text("no volume")
    (folder / "unknown.xyz").write_text("no volume")
    (folder / "empty.nii.gz").touch()
    (folder / "folder.nii.gz").mkdir()
    save(volume * 0, np.eye(4), folder / "zeros.nii.gz")
    nan = volume.astype(np.float32)
    nan[0, 0, 0] = np.nan
    save(nan, np.eye(4), folder / "nan.nii.gz")
    save(np.stack([volume] * 2, -1), np.eye(4), folder / "channels.nii.gz")
    save(volume[..., 0], np.eye(4), folder / "flat.nii.gz")


def test_where_files_are_broken_the_others_are_segmented_and_all_broken_ones_named(
    tmp_path, monkeypatch
):
    folder, stock_save = tmp_path / "scans", nibabel.save
    folder.mkdir()
    write_broken(folder)

    def save_until_full(image, path):
        if "full" in str(path):
            Path(path).write_bytes(b"half a file")
            raise OSError(28, os.strerror(28))
        stock_save(image, path)

    monkeypatch.setattr(nibabel, "save", save_until_full)
    names = [*BROKEN, *GOOD]
    with pytest.raises(SystemExit) as stopped:
        segment([str(folder / name) for name in names], tmp_path)
    first, *lines = str(stopped.value).splitlines()
    assert first == f"{len(BROKEN)} of {len(names)} images failed, all others are done:"
    for line, (name, message) in zip(lines, BROKEN.items(), strict=True):
        assert f"'{folder / name}'" in line
        assert re.search(message, line)

    output = tmp_path / "segmentations"
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    stems = [name.removesuffix(".nii.gz") for name in GOOD]
    assert written == {f"{n}/{n}_{end}" for n in stems for end in ("seg.nii.gz", "overlay.png")}


def test_weights_that_give_nan_segment_nothing(tmp_path):
    weights = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    weights["levels.1.update.weight"][-1] = float("nan")
    torch.save(weights, tmp_path / "model.pt")
    save(np.random.default_rng(0).random((8, 9, 7)), np.eye(4), tmp_path / "scan.nii.gz")
    with pytest.raises(SystemExit) as stopped:
        segment([str(tmp_path / "scan.nii.gz")], tmp_path / "out", tmp_path / "model.pt")
    assert "scan.nii.gz': ValueError: `logits` must be finite, got" in str(stopped.value)
    assert not (tmp_path / "out" / "segmentations").exists()


class Hostile:
    """Makes a folder where it is unpickled as Python does it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_weights_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"levels.0.update.weight": Hostile()}, tmp_path / "model.pt")
    save(np.eye(8)[None] * np.ones((4, 1, 1)), np.eye(4), tmp_path / "scan.nii.gz")
    with pytest.raises(RuntimeError) as stopped:
        segment([str(tmp_path / "scan.nii.gz")], tmp_path, tmp_path / "model.pt")
    error = stopped.value.__cause__
    assert str(error).startswith(f"`ckpt_path` must name weights of this network, got '{tmp_path}")
    assert isinstance(error.__cause__, UnpicklingError)
    assert not (tmp_path / "executed").exists()
