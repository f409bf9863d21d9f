"""The library's compilation: cached, atomic, and a clear fallback."""

import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch

from perseid_kernels.backend import backend_for
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.native import build, load_native_backend
from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import BuildError, build_library
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PageList, Segments
from tests.kernels.cases import attention_batch, int4_weight, int8_weight, lora_pool
from tests.tools import require_tool

CPU = torch.device("cpu")
TOUCH_OUTPUT = 'while [ "$1" != -o ]; do shift; done\n: > "$2"'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("PERSEID_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def fake_compiler(folder: Path, script: str) -> str:
    """An executable that says its version and else runs `script`."""
    file = folder / "fake-c++"
    file.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n{script}\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_a_second_build_reads_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f"echo call >> {log}\n{TOUCH_OUTPUT}"))
    first = build_library()
    assert build_library() == first
    assert log.read_text().splitlines() == ["call"]
    assert [file.name for file in cache.iterdir()] == [first.name], "nothing temporary stays"


def test_other_options_are_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, TOUCH_OUTPUT))
    first = build_library()
    monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-g"))
    assert build_library() != first


def test_other_sources_are_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, TOUCH_OUTPUT))
    sources = tmp_path / "sources"
    shutil.copytree(build._HERE, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", sources)
    first = build_library()
    for name in ("simd.h", "rows.cpp"):
        (sources / name).write_text((sources / name).read_text() + "// changed\n")
        assert build_library() != first
        first = build_library()


def test_a_failing_compiler_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo simd.h: bad line >&2; exit 1"))
    with pytest.raises(BuildError, match="bad line"):
        build_library()
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("compiler", ["", "/no/such/compiler"])
def test_without_a_compiler_the_cpu_computes_in_torch(
    cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="install g"):
        assert isinstance(backend_for(CPU), EagerBackend)


def test_ziglang_compiles_where_the_system_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: name == "ziglang")
    assert build._compiler() == [sys.executable, "-m", "ziglang", "c++"]


def test_a_broken_library_falls_back(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done\necho text > "$2"'))
    with pytest.warns(UserWarning, match="falling back"):
        assert load_native_backend() is None


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEID_NATIVE", "0")
    assert load_native_backend() is None


@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma -mno-f16c"])
def test_narrower_lanes_agree(without: str, cache: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """CPUs without AVX-512 take eight lanes, those without AVX2 plain loops. What adds no lanes up is the same bits; a
    norm and a dot product do, and so may differ by the rounding of their sums."""
    require_tool("g++", "Debian: g++")
    here = NativeBackend(build_library(), num_threads=1, activations="float32")
    monkeypatch.setenv("CXX", f"g++ {without} -O1")
    monkeypatch.setattr(build, "_OPTIONS", tuple(option for option in build._OPTIONS if option != "-O3"))
    narrow = NativeBackend(build_library(), num_threads=1)
    assert not narrow.has_integer_matmul
    assert_same_products(here, narrow, rng)
    gate_up, weight_N = torch.randn(3, 62, generator=rng) * 20, torch.randn(62, generator=rng)
    assert torch.equal(narrow.silu_mul(gate_up), here.silu_mul(gate_up))
    assert all(map(torch.equal, narrow.best(gate_up), here.best(gate_up)))
    assert_close(narrow.rms_norm(gate_up, weight_N, 1e-5), here.rms_norm(gate_up, weight_N, 1e-5))
    assert_close(*(attended(backend) for backend in (narrow, here)))
    assert_close(*(adapted(backend) for backend in (narrow, here)))


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Sums of some dozen terms of size 1 in two orders."""
    torch.testing.assert_close(one, other, rtol=2e-6, atol=4e-6)


def assert_same_products(here: NativeBackend, narrow: NativeBackend, rng: torch.Generator) -> None:
    for weight in (
        int4_weight(rng, 35, 96, 32, "nf4"),
        int4_weight(rng, 35, 96, 32, "q4_1"),
        int8_weight(rng, 35, 96, 32),
    ):
        for num_rows in (1, 3, 7):
            x = torch.randn(num_rows, 96, generator=rng)
            ours, theirs = torch.empty(num_rows, 35), torch.empty(num_rows, 35)
            here.matmul(x, here.pack(weight, CPU), ours)
            narrow.matmul(x, narrow.pack(weight, CPU), theirs)
            assert torch.equal(ours, theirs)


def attended(backend: NativeBackend) -> torch.Tensor:
    """A prompt's chunk and a decode, heads of a width that fills no vector."""
    rng = torch.Generator().manual_seed(3)
    batch, num_blocks = attention_batch(rng, [19, 1], [71, 34], 16)
    k_cache, v_cache = torch.randn(2, num_blocks, 16, 2, 40, generator=rng)
    q = torch.randn(20, 6, 40, generator=rng)
    out = torch.empty_like(q)
    backend.attention(q, k_cache, v_cache, batch, 0.15, out)
    return out


def adapted(backend: NativeBackend) -> torch.Tensor:
    """Two adapters, one of them with two pages, beside a base row."""
    rng = torch.Generator().manual_seed(4)
    slices = (24, 40)
    pages = RankPages.of(*lora_pool(rng, 3, 70, slices), slices)
    segments = Segments.build([PageList.of((0, 2)), None, PageList.of((1,)), PageList.of((0, 2))])
    assert segments is not None
    out = torch.randn(4, 64, generator=rng)
    backend.add_lora(torch.randn(4, 70, generator=rng) / 8, pages, segments, out)
    return out
