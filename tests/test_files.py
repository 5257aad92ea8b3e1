import os
from pathlib import Path

import pytest

from mednca_monai.files import check_folder, whole_file


def write(path, text, error=None):
    with whole_file(path) as part:
        Path(part).write_text(text[:2])
        if error:
            raise error
        Path(part).write_text(text)


def test_a_file_appears_whole_in_place_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("first", "second"):
        write("some.txt", text)
        assert Path("some.txt").read_text() == text
    assert os.listdir() == ["some.txt"]


def test_a_failure_names_the_file_and_leaves_the_one_before_alone(tmp_path):
    path = tmp_path / "some.txt"
    write(path, "first")
    with pytest.raises(OSError, match=r"some.txt' could not be written: .*No space left"):
        write(path, "second", OSError(28, os.strerror(28)))
    with pytest.raises(KeyboardInterrupt):
        write(path, "second", KeyboardInterrupt())
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["some.txt"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OSError, match=r"none/some.txt' could not be written: .*No such file"):
        write(tmp_path / "none" / "some.txt", "first")


def test_a_folder_to_write_to_is_made_and_stays_empty(tmp_path):
    check_folder("output_dir", tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    write(tmp_path / "some.txt", "text")
    with pytest.raises(OSError, match=r"`output_dir` must be a folder to write to, got '.*some"):
        check_folder("output_dir", tmp_path / "some.txt")
