"""A file is there whole or not at all, and nothing but a file is replaced."""

import os
import stat
import threading
from pathlib import Path

import pytest

from perseid_server.training.files import check_place, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_file_is_written_into(tmp_path: Path):
    """As /dev/null and /dev/stdout are, which must still be devices afterwards."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_whole(pipe, b"content")
    is_pipe = stat.S_ISFIFO(pipe.stat().st_mode)
    if not is_pipe:  # let the reader go
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        pytest.fail("the pipe was replaced by a file")
    reader.join(10)
    assert read == [b"content"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, is_there: bool):
    target, link = tmp_path / "other" / "file", tmp_path / "link"
    if is_there:
        write_whole(target, b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_folder_or_a_link_to_itself_is_told(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(OSError, match=r"Is a directory|Too many levels"):
            write_whole(path, b"")
        with pytest.raises(OSError, match=r"Is a directory|Too many levels"):
            check_place(path)


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    check_place(path)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"old")
    check_place(path)
    assert path.read_bytes() == b"old"
    check_place(Path(os.devnull))
    with pytest.raises(OSError, match="Not a directory"):
        check_place(path / "below")
    with pytest.raises(OSError, match="name too long"):
        check_place(tmp_path / ("x" * 300))
