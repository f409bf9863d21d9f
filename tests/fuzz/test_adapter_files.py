"""Files that clients bring: adapters, gate sets, Medusa heads, MeteoRA checkpoints. Each is refused with our own error,
or taken for what it says; in bounded memory either way."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from perseid_server.adapters.inspect import inspect_adapter
from perseid_server.adapters.layout import kind_of
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.errors import AdapterRejected
from perseid_server.speculation.heads_config import HeadsConfig
from perseid_server.speculation.heads_file import check_heads
from perseid_server.speculation.pickled_heads import unpickle_heads
from tests.fakes import tiny_spec
from tests.fuzz.bounds import bounded_memory
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.mutate import corrupt, json_bytes, mutate
from tests.fuzz.tensor_files import spoiled
from tests.server.meteora_folder import write_meteora
from tests.server.speculation.heads_folders import medusa_v1, write_heads
from tests.server.stack import certain_router, write_adapter, write_gate_set

BASE = tiny_spec()
VERSION = "ab" * 32


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A good folder of each kind."""
    root = tmp_path_factory.mktemp("good")
    folders = {
        "adapter": write_adapter(root / "adapter"),
        "gates": write_gate_set(root / "gates", {"one": VERSION}, router=certain_router("one")),
        "heads": write_heads(root / "heads", medusa_v1(), config=HeadsConfig()),
        "meteora": write_meteora(root / "meteora"),
    }
    config = json.loads((folders["adapter"] / "adapter_config.json").read_text())
    config |= {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"q_proj": 8}, "base_model_name_or_path": "tiny"}
    (folders["adapter"] / "adapter_config.json").write_text(json.dumps(config))
    (folders["heads"] / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "original_lm_head": False}))
    assert all(inspect_adapter(folder, BASE).accepted for folder in folders.values())
    return folders


def spoil(random: Random, folder: Path, only: Callable[[Path], bool]) -> None:
    """Change one file of a folder."""
    path = random.choice(sorted(path for path in folder.iterdir() if only(path)))
    raw = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(
            corrupt(random, raw) if random.random() < 0.2 else json_bytes(random, mutate(random, json.loads(raw)))
        )
    else:
        path.write_bytes(spoiled(random, raw))


def copied(source: Path, target: Path) -> Path:
    """Another one of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def check_folder(random: Random, folder: Path, only: Callable[[Path], bool]) -> None:
    """A changed folder gets a verdict, and one that is accepted can be used."""
    spoil(random, folder, only)
    with bounded_memory():
        report = inspect_adapter(folder, BASE)
        if not report.accepted:
            assert 0 < len(report.reason or "") < 4000
        elif kind_of(folder) == "adapter" and (folder / "adapter_config.json").exists():
            use_adapter(folder)
        elif kind_of(folder) == "heads":
            numbers = check_heads(folder, BASE).tensors()
            assert all(np.isfinite(weight).all() for of_head in numbers.weights for weight in of_head)


def use_adapter(folder: Path) -> None:
    """The numbers of an adapter that was accepted are those of this base, and are numbers."""
    checked = check_adapter(folder, BASE)
    for site, pair in checked.pairs.items():
        a, b = checked.file.read(pair.a), checked.file.read(pair.b)
        shape = BASE.projections[site.projection]
        assert (a.shape, b.shape) == ((pair.rank, shape.in_features), (shape.out_features, pair.rank))
        assert all(np.isfinite(numbers).all() for numbers in (a, b, pair.scale))


@pytest.mark.parametrize("kind", ["adapter", "gates", "heads", "meteora"])
@fuzzer(short=40, long=400)
def test_configs(campaign: Campaign, good: Mapping[str, Path], kind: str, tmp_path: Path) -> None:
    def check(random: Random) -> None:
        check_folder(random, copied(good[kind], tmp_path / "case"), lambda path: path.suffix == ".json")

    campaign.run(check)


@pytest.mark.parametrize("kind", ["adapter", "gates", "heads", "meteora"])
@fuzzer(short=40, long=400)
def test_weights(campaign: Campaign, good: Mapping[str, Path], kind: str, tmp_path: Path) -> None:
    def check(random: Random) -> None:
        check_folder(random, copied(good[kind], tmp_path / "case"), lambda path: path.suffix == ".safetensors")

    campaign.run(check)


@fuzzer(short=150, long=1500)
def test_safetensors(campaign: Campaign, good: Mapping[str, Path], tmp_path: Path) -> None:
    """What our reader takes, the library's takes too, and both read the same numbers."""
    raw = (good["adapter"] / "adapter_model.safetensors").read_bytes()
    path = tmp_path / "file.safetensors"

    def check(random: Random) -> None:
        path.write_bytes(spoiled(random, raw))
        with bounded_memory():
            try:
                file = TensorFile.open(path, integers=True)
            except AdapterRejected:
                return
            theirs = library_reads(path.read_bytes())
            assert theirs is None or theirs.keys() == file.tensors.keys()
            for name, entry in file.tensors.items():
                ours = file.read_integers(name) if entry.dtype in {"I32", "I64"} else file.read(name)
                assert theirs is None or np.array_equal(ours, theirs[name].astype(ours.dtype), equal_nan=True)

    campaign.run(check)


def library_reads(raw: bytes) -> dict[str, Any] | None:
    """What safetensors itself reads; None for a type that NumPy lacks."""
    try:
        return safetensors.numpy.load(raw)
    except (KeyError, TypeError):
        return None
    except SafetensorError as error:
        raise AssertionError(f"accepted, and safetensors says {error}") from error


@fuzzer(short=40, long=500)
def test_pickled_heads(campaign: Campaign, tmp_path: Path) -> None:
    """Medusa v1's zip archive of a pickle and its numbers."""
    import torch  # noqa: PLC0415  slow to import

    tensors = {name: torch.from_numpy(value) for name, value in medusa_v1(1).items()}
    torch.save(tensors, tmp_path / "good.pt")
    raw = (tmp_path / "good.pt").read_bytes()
    folder = tmp_path / "heads"
    folder.mkdir()

    def check(random: Random) -> None:
        (folder / "medusa_lm_head.safetensors").unlink(missing_ok=True)
        (folder / "medusa_lm_head.pt").write_bytes(spoiled_pickle(random, raw))
        with bounded_memory():
            try:
                unpickle_heads(folder)
            except AdapterRejected:
                return
            assert inspect_adapter(folder, BASE).accepted in {True, False}

    campaign.run(check)


def spoiled_pickle(random: Random, raw: bytes) -> bytes:
    """The archive, its table at the end, or the pickle inside, changed."""
    begin = raw.index(b"\x80\x02")
    match random.randrange(3):
        case 0:
            return corrupt(random, raw)
        case 1:
            return raw[:-400] + corrupt(random, raw[-400:])
        case _:
            pickle = raw[begin : begin + 600]
            changed = corrupt(random, pickle)[:600].ljust(600, b".")  # as long as before: the archive stays whole
            return raw[:begin] + changed + raw[begin + 600 :]
