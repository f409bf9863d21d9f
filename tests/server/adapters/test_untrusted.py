"""Files of strangers are read as far as a limit and no further."""

import os
import tracemalloc
from pathlib import Path

import pytest

from perseid_server.adapters.untrusted import open_regular, read_small
from perseid_server.errors import AdapterRejected, quoted


def test_a_file_as_large_as_the_limit_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    assert read_small(tmp_path / "x", 4) == b"1234"
    with pytest.raises(AdapterRejected, match="x is larger than 3 bytes"):
        read_small(tmp_path / "x", 3)


def test_a_huge_file_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected, match="larger than"):
            read_small(tmp_path / "x", 1 << 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_and_closed(make, tmp_path: Path) -> None:
    make(tmp_path / "x")
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(AdapterRejected, match="x is not a regular file"):
        open_regular(tmp_path / "x")
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open


def test_what_is_quoted_is_cut_where_it_is_long_or_deep() -> None:
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert quoted(deep) == "[[[[...]]]]"
    assert len(quoted("x" * 10_000)) <= 200
    assert len(quoted(10**4000)) <= 40
