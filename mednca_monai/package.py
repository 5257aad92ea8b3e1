"""Build the form of the bundle that others use: with a copy of this package inside.

Run: python -m mednca_monai.package [--output_dir dist] [--bundle_dir bundle]
"""

import argparse
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from mednca_monai.data import read_json

PACKAGE = Path(__file__).parent
BUNDLE = PACKAGE.parent / "bundle"
NAME = "hippocampus_mri_mednca_segmentation"
PARTS = ("LICENSE", "configs/*", "docs/*", "models/*", "scripts/*.py")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can hold


def bundle_files(bundle_dir: Path) -> dict[str, Path]:
    """Files of a packaged bundle by their place in it, sorted.

    Raises:
        ValueError: where the folder lacks a file of a bundle.
    """
    found = [path for part in PARTS for path in bundle_dir.glob(part) if path.is_file()]
    files = {p.relative_to(bundle_dir).as_posix(): p for p in found if p.name[0] != "."}
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"):
        if name not in files:
            raise ValueError(f"`bundle_dir` must hold a bundle, got '{bundle_dir}' without {name}.")
    code = [*PACKAGE.glob("*.py"), PACKAGE / "py.typed"]
    files |= {f"{PACKAGE.name}/{path.name}": path for path in code}
    return dict(sorted(files.items()))


def package(output_dir: str = "dist", bundle_dir: str = str(BUNDLE)) -> str:
    """Write ``<name>`` and ``<name>_v<version>.zip``; the same files give the same bytes.

    Args:
        output_dir: folder to write to; made if needed. Files that it holds by these names are
            replaced.
        bundle_dir: the bundle; by default that of the source tree.

    Returns:
        Path of the zip file.

    Raises:
        ValueError: where ``bundle_dir`` holds no bundle, or ``output_dir`` holds one with further
            files, such as a training's or an older version's, which would be lost.
    """
    files = bundle_files(Path(bundle_dir))
    version = read_json(files["configs/metadata.json"]).get("version")
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ValueError(f"`version` of metadata.json must be numbers and dots, got {version!r}.")
    target = Path(output_dir)
    there = [path for path in (target / NAME).rglob("*") if path.is_file()]
    places = [path.relative_to(target / NAME) for path in there if path.suffix != ".pyc"]
    others = {place.as_posix() for place in places} - set(files)
    if others:
        raise ValueError(
            f"`output_dir` must hold a bundle's own files, got '{target / NAME}' with "
            f"{len(others)} others, such as {min(others)}: move it."
        )
    target.mkdir(parents=True, exist_ok=True)
    archive = target / f"{NAME}_v{version}.zip"
    with tempfile.TemporaryDirectory(prefix=".package_", dir=target) as folder:
        built = Path(folder)
        with zipfile.ZipFile(built / archive.name, "w", zipfile.ZIP_DEFLATED) as file:
            for name, path in files.items():
                entry = zipfile.ZipInfo(f"{NAME}/{name}", EPOCH)
                entry.external_attr = 0o644 << 16
                file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(built / archive.name) as file:
            file.extractall(built)
        shutil.rmtree(target / NAME, ignore_errors=True)
        os.replace(built / NAME, target / NAME)
        os.replace(built / archive.name, archive)
    return str(archive)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", default="dist")
    parser.add_argument("--bundle_dir", default=str(BUNDLE))
    print(package(**vars(parser.parse_args())))
