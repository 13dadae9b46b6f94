"""Nobody finds half of a file or folder, and what was there before outlives a failure."""

from __future__ import annotations

import os
import pathlib

import pytest

from kaleido_jax import beside


def stop_at_half(path: pathlib.Path) -> None:
    path.write_text("ha")
    raise RuntimeError("half written")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), beside.new_file(path) as temporary:
        stop_at_half(temporary)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with beside.new_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_failed_rename_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError), beside.new_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "above" / "folder"
    with pytest.raises(RuntimeError, match="half"), beside.new_folder(folder) as temporary:
        stop_at_half(temporary / "part")
    assert os.listdir(folder.parent) == []
    folder.mkdir()  # an empty one is replaced
    with beside.new_folder(folder) as temporary:
        (temporary / "part").write_text("1")
    assert os.listdir(folder) == ["part"] and os.listdir(folder.parent) == ["folder"]


def test_a_folder_that_holds_something_stays(tmp_path):
    (tmp_path / "mine").write_text("1")
    with pytest.raises(OSError), beside.new_folder(tmp_path) as temporary:
        (temporary / "part").write_text("1")
    assert os.listdir(tmp_path) == ["mine"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_written_bytes_make_their_folders(tmp_path):
    beside.write_bytes(tmp_path / "a" / "b", b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"
    assert os.listdir(tmp_path / "a") == ["b"]
