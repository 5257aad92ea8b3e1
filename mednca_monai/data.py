"""Lists of cases from folders in the layout of the Medical Segmentation Decathlon (MSD)."""

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.apps.datasets import DecathlonDataset
from monai.apps.utils import download_and_extract
from monai.data.folder_layout import FolderLayout

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".nii", ".nii.gz")


def case_name(path: str | os.PathLike[str]) -> str:
    """File name without folder and image suffix.

    Example:
        >>> case_name("imagesTr/hippocampus_001.nii.gz")
        'hippocampus_001'
    """
    name = os.path.basename(path)
    suffix = max((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]


def fetch_decathlon(dataset_dir: Path) -> None:
    """Download an MSD task, named by the folder, with the address and checksum that MONAI holds.

    Raises:
        FileNotFoundError: where the folder's name is no MSD task or the download fails.
    """
    task = dataset_dir.name
    advice = "Point `dataset_dir` to a folder that holds an MSD `dataset.json`"
    if task not in DecathlonDataset.resource or (
        dataset_dir.exists() and any(dataset_dir.iterdir())
    ):
        raise FileNotFoundError(f"{advice}, got '{dataset_dir}', which has none.")
    address = DecathlonDataset.resource[task]
    logger.info(f"'{dataset_dir}' has no dataset.json: fetching {address}.")
    dataset_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dataset_dir.parent) as folder:
        try:
            download_and_extract(
                address, f"{folder}/{task}.tar", folder, hash_val=DecathlonDataset.md5[task]
            )
        except Exception as error:
            raise FileNotFoundError(
                f"{advice}, got '{dataset_dir}', which has none, and {address} could not be "
                f"fetched ({error}). For a first run without data, add configs/synthetic.json."
            ) from error
        try:
            os.replace(f"{folder}/{task}", dataset_dir)
        except OSError:  # another process, of a run on several GPUs, may have been faster
            if not (dataset_dir / "dataset.json").is_file():
                raise


def check_names(argument: str, images: Sequence[str]) -> None:
    """Raise ValueError where the results of two images, named after them, would be one file."""
    results = sorted(str(FolderLayout("", makedirs=False).filename(image)) for image in images)
    for name, following in itertools.pairwise(results):
        if name == following:
            raise ValueError(f"`{argument}` must name files that differ, got '{name}' twice.")


def inside(dataset_dir: Path, name: str) -> str:
    """Path of a file that a ``dataset.json`` names, which must lie in the data set's folder.

    Raises:
        ValueError: where it lies elsewhere, or is a link to elsewhere.
    """
    path = Path(os.path.normpath(dataset_dir / name))
    if dataset_dir not in path.parents or dataset_dir.resolve() not in path.resolve().parents:
        raise ValueError(
            f"`dataset.json` must name files in '{dataset_dir}', got '{name}', which lies or "
            "leads elsewhere."
        )
    return str(path)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object, else raise ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"'{path}' must be JSON, got: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object, got {type(content).__name__}.")
    return content


def read_dataset(dataset_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return the folder and its parsed ``dataset.json``, fetched first if it is an MSD task's."""
    folder = Path(os.path.abspath(dataset_dir))
    if not (folder / "dataset.json").is_file():
        fetch_decathlon(folder)
    return folder, read_json(folder / "dataset.json")


def load_datalist(
    dataset_dir: str | os.PathLike[str], split_file: str | os.PathLike[str] | None, part: str
) -> list[dict[str, str]]:
    """List the labelled cases of an MSD folder that belong to a part of it, sorted by name.

    A split file is JSON with lists of case names, ``training`` and ``validation``; cases that it
    does not name belong to neither. A data set that has none of its cases, or no split file, is
    split by the rule that made the shipped one: every fifth case by sorted name is validation.

    Args:
        dataset_dir: folder with a ``dataset.json``. If it has none and is named as an MSD task
            (such as ``Task04_Hippocampus``), the task is downloaded to it.
        split_file: path of the split file or ``None``.
        part: ``"training"``, ``"validation"`` or ``"all"``.

    Returns:
        Dictionaries with the paths ``image`` and ``label``.

    Raises:
        ValueError: where ``part`` is another, the part has no case, two cases have the same name,
            or a path leaves the folder.
        FileNotFoundError: where the data set or a file that it names is missing.
    """
    if part not in ("training", "validation", "all"):
        raise ValueError(f"`part` must be 'training', 'validation' or 'all', got {part!r}.")
    folder, description = read_dataset(dataset_dir)
    items = description.get("training")
    if not isinstance(items, list) or not items:
        raise ValueError(f"`dataset.json` must list cases under 'training', got {items!r}.")
    for item in items:
        files = [item.get(key) for key in ("image", "label")] if isinstance(item, dict) else [None]
        if not all(isinstance(file, str) for file in files):
            raise ValueError(f"`dataset.json` must give each case image and label, got {item!r}.")
    check_names("dataset.json", [item["image"] for item in items])
    cases = {case_name(item["image"]): item for item in items}
    names = sorted(cases)
    split = {"training": [n for i, n in enumerate(names) if i % 5], "validation": names[::5]}
    if split_file is not None:
        given = read_json(Path(split_file))
        if not all(isinstance(given.get(key), list) for key in split):
            raise ValueError(
                f"`split_file` must list 'training' and 'validation', got {sorted(given)}."
            )
        named = [*given["training"], *given["validation"]]
        if not all(isinstance(name, str) for name in named) or len(set(named)) < len(named):
            raise ValueError(f"`split_file` must name each case once, got {named!r}.")
        unknown = [name for name in named if name not in cases]
        if len(unknown) < len(named):
            split = {key: [n for n in given[key] if n in cases] for key in split}
        else:
            logger.warning(f"'{split_file}' has no case of '{folder}': every fifth is validation.")
        if 0 < len(unknown) < len(named):
            logger.warning(f"'{folder}' lacks {len(unknown)} cases of '{split_file}': {unknown}.")
    chosen = names if part == "all" else sorted(split[part])
    if not chosen:
        raise ValueError(
            f"`dataset_dir` and `split_file` must leave cases for {part}, got none of the "
            f"{len(names)} in '{folder}' by '{split_file}'."
        )
    listed = [{key: inside(folder, cases[n][key]) for key in ("image", "label")} for n in chosen]
    missing = [path for case in listed for path in case.values() if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"`dataset.json` must name files that exist, got {missing}.")
    return listed


def list_images(path: str | os.PathLike[str] | Sequence[str]) -> list[dict[str, str]]:
    """List the images to segment.

    Args:
        path: one image file; a folder of image files; an MSD folder (its ``test`` images, or else
            its training ones); or a list of image files.

    Returns:
        Dictionaries with the path ``image``, sorted unless a list was given.

    Raises:
        FileNotFoundError: where none of the images exists.
        ValueError: where two images have the same name, or a path leaves the MSD folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        images = [str(p) for p in path]
    elif os.path.isdir(path) and not (Path(path) / "dataset.json").is_file():
        files = [p for p in Path(path).iterdir() if not p.name.startswith(".")]
        images = sorted(str(p) for p in files if p.name.lower().endswith(IMAGE_SUFFIXES))
        others = sorted(p.name for p in files if str(p) not in images)
        if others:
            logger.warning(f"Of '{path}' only NIfTI files are segmented, not {others}.")
    elif os.path.isfile(path):
        images = [str(path)]
    elif not os.path.isdir(path) and Path(path).name not in DecathlonDataset.resource:
        images = []
    else:
        folder, description = read_dataset(path)
        items = description.get("test") or description.get("training") or []
        listed = items if isinstance(items, list) else [None]
        names: list[Any] = [i.get("image") if isinstance(i, dict) else i for i in listed]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"`dataset.json` must list images, got {items!r}.")
        images = sorted(inside(folder, name) for name in names)
    if not any(os.path.exists(image) for image in images):
        raise FileNotFoundError(f"`datalist` must name image files, got {path!r}.")
    check_names("datalist", images)
    return [{"image": image} for image in images]
