"""Files that appear whole or not at all, and folders for them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a path to write to, in the same folder, and move the file to ``path`` once it is there.

    Raises:
        OSError: where writing fails; it names ``path``, whose former content stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(f"{folder}/text.txt") as part:
        ...         _ = Path(part).write_text("all of it")
        ...     os.listdir(folder)
        ['text.txt']
    """
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".part_{name}")
    try:
        yield part
        os.replace(part, path)
    except Exception as error:
        raise OSError(f"'{path}' could not be written: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Make a folder if there is none, and write to it, before any work could be lost.

    Raises:
        OSError: where that fails; it names the argument.
    """
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"`{name}` must be a folder to write to, got '{path}': {error}") from error
