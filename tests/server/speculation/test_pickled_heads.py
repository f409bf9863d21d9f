"""Medusa v1's pickles are read as data: what torch.save writes of heads comes over exactly, anything else is refused,
and nothing that a pickle asks for is ever run."""

import io
import os
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from perseid_server.errors import AdapterRejected
from perseid_server.speculation.heads_config import TENSORS_FILE
from perseid_server.speculation.heads_file import check_heads
from perseid_server.speculation.heads_folder import PICKLE_FILE
from perseid_server.speculation.pickled_heads import unpickle_heads
from tests.fakes import tiny_spec
from tests.server.speculation.heads_folders import medusa_v1, medusa_v2

BASE = tiny_spec()
E = BASE.hidden_size


def torch_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values).to(dtype) for name, values in medusa_v1(2).items()}


def saved(folder: Path, content: object, **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / PICKLE_FILE, **options)
    return folder


def refusal(folder: Path) -> str:
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(AdapterRejected) as caught:
        unpickle_heads(folder)
    assert {path.name for path in folder.iterdir()} == before
    return caught.value.message


# --- what torch writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_torch_saves_comes_over_exactly(tmp_path, dtype):
    tensors = torch_tensors(dtype)
    unpickle_heads(saved(tmp_path, tensors))
    assert [path.name for path in tmp_path.iterdir()] == [TENSORS_FILE]
    checked = check_heads(tmp_path, BASE)
    assert (checked.info.layout, checked.info.num_heads) == ("Medusa v1", 2)
    read = checked.tensors()
    for head in range(2):
        np.testing.assert_array_equal(read.weights[head][0], tensors[f"{head}.0.linear.weight"].float().numpy())
        np.testing.assert_array_equal(read.biases[head][0], tensors[f"{head}.0.linear.bias"].float().numpy())
        np.testing.assert_array_equal(read.lm_heads[head], tensors[f"{head}.1.weight"].float().numpy())


class ResBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(E, E)


def test_the_state_of_modules_with_shared_and_sliced_storages(tmp_path):
    """As the training of Medusa v1 saves it: one block in all places, an OrderedDict with metadata, parameters."""
    block = ResBlock()
    heads = torch.nn.ModuleList([torch.nn.Sequential(block, block) for _ in range(2)])
    state = heads.state_dict()
    unpickle_heads(saved(tmp_path, state))
    read = check_heads(tmp_path, BASE).tensors()
    np.testing.assert_array_equal(read.weights[1][1], block.linear.weight.detach().numpy())
    rows = torch.randn(3 * E, E)
    sliced = OrderedDict({"0.0.linear.weight": torch.nn.Parameter(rows[E : 2 * E])})
    unpickle_heads(saved(tmp_path / "sliced", sliced))
    read = check_heads(tmp_path / "sliced", BASE).tensors()
    np.testing.assert_array_equal(read.weights[0][0], rows[E : 2 * E].numpy())


def test_a_storage_that_many_tensors_share_is_held_once(tmp_path):
    """Small tensors of a large storage do not keep it: memory follows the file's size, not its number of names."""
    storage = torch.randn(1 << 20)
    named = {f"{place}.0.linear.weight": storage[place : place + 1].view(1, 1) for place in range(8)}
    folder = saved(tmp_path, OrderedDict(named))
    tracemalloc.start()
    try:
        unpickle_heads(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * storage.nbytes


REFUSED_OF_TORCH: dict[str, tuple[Callable[[], object], str]] = {
    "a module": (lambda: torch.nn.Linear(E, E), "asks for 'torch.nn.modules.linear.Linear'"),
    "one tensor": (lambda: torch.ones(2), "no dictionary of tensors"),
    "an empty dictionary": (dict, "no dictionary of tensors"),
    "a dictionary in a dictionary": (lambda: {"state_dict": torch_tensors()}, "'state_dict' is not a tensor"),
    "a number among tensors": (lambda: torch_tensors() | {"epoch": 3}, "'epoch' is not a tensor"),
    "keys that are numbers": (lambda: {1: torch.ones(2)}, "keys that are not names"),
    "integers": (lambda: {"0.0.linear.weight": torch.ones(E, E, dtype=torch.int64)}, "asks for 'torch.LongStorage'"),
    "a transposed tensor": (lambda: {"0.0.linear.weight": torch.randn(E, 2 * E).T}, ".contiguous()"),
    "a tensor of three dimensions": (lambda: {"0.0.linear.weight": torch.ones(2, 2, 2)}, "heads do not have"),
    "other tensors": (lambda: {"model.weight": torch.ones(2)}, "unknown tensor 'model.weight'"),
}


@pytest.mark.parametrize("case", REFUSED_OF_TORCH)
def test_what_else_torch_saves_is_refused(tmp_path, case):
    make, words = REFUSED_OF_TORCH[case]
    assert words in refusal(saved(tmp_path, make()))


def test_the_old_format_of_torch_is_refused(tmp_path):
    folder = saved(tmp_path, torch_tensors(), _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(folder)


# --- hostile pickles ----------------------------------------------------------------------------------------------


def archive(folder: Path, pickled: bytes, *parts: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive as torch writes it, with any pickle in it."""
    with zipfile.ZipFile(folder / PICKLE_FILE, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in parts:
            file.writestr(f"archive/{name}", content)
    return folder


class Calls:
    """Pickles into a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path: Path) -> Calls:
    return Calls(Path.touch, path)


def run(command: str) -> Calls:
    return Calls(os.system, command)


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "a call": lambda mark: pickle.dumps(run(f"touch {mark}"), 2),
    "a call in a dictionary": lambda mark: pickle.dumps({"0.0.linear.weight": run(f"touch {mark}")}, 2),
    "a call deep inside": lambda mark: pickle.dumps({"a": ({"b": ((touch(mark),),)},)}, 2),
    "a call as a key": lambda mark: pickle.dumps({(run(f"touch {mark}"),): 1}, 2),
    "a call in the newest protocol": lambda mark: pickle.dumps(run(f"touch {mark}"), 5),
    "a call in the oldest protocol": lambda mark: pickle.dumps(run(f"touch {mark}"), 0),
    "eval": lambda mark: pickle.dumps(Calls(eval, f"open({str(mark)!r}, 'w')"), 2),
    "INST": lambda mark: f"(S'touch {mark}'\nios\nsystem\n.".encode(),
    "OBJ": lambda mark: f"(cos\nsystem\nS'touch {mark}'\no.".encode(),
    "a call by the name of another": lambda mark: (
        f"ctorch._utils\n_rebuild_tensor_v2.os\nS'touch {mark}'\n\x85R.".encode()
    ),
    "attributes of a known name": lambda mark: f"ccollections\nOrderedDict.__init__\nS'touch {mark}'\n\x85R.".encode(),
    "NEWOBJ": lambda _: b"ccollections\nOrderedDict\n)\x81.",
    "an extension": lambda _: b"\x80\x02\x82\x01.",
    "STACK_GLOBAL": lambda _: b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
    "a known name alone": lambda _: b"ccollections\nOrderedDict\n.",
    "an ordered dictionary with arguments": lambda _: b"ccollections\nOrderedDict\n(K\x01tR.",
    "a call of a number": lambda _: b"K\x01)R.",
    "a storage that is none": lambda _: b"(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.",
    "a huge bytearray": lambda _: b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".",
    "a huge string": lambda _: b"X" + (1 << 31).to_bytes(4, "little") + b".",
    "a huge place in the memo": lambda _: b"}r\xff\xff\xff\xff.",
    "an unknown place in the memo": lambda _: b"h\x05.",
    "nothing on the stack": lambda _: b"0.",
    "items of no dictionary": lambda _: b"K\x01(K\x01K\x02u.",
    "an odd number of items": lambda _: b"}(X\x01\x00\x00\x00au.",
    "no end": lambda _: b"}",
    "nothing": lambda _: b"",
    "what grows when it is unfolded": lambda _: b"}K\x01" + b"q\x01h\x01\x86" * 60 + b"K\x02s.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, case):
    mark = tmp_path / "was run"
    (tmp_path / "heads").mkdir()
    assert "the pickle is not read" in refusal(archive(tmp_path / "heads", HOSTILE[case](mark)))
    assert not mark.exists()


def test_the_hostile_pickles_would_do_harm(tmp_path):
    """What the refusals are worth: pickle itself runs these."""
    for case in ("a call", "a call in a dictionary", "eval", "INST", "OBJ"):
        mark = tmp_path / case.replace(" ", "-")
        pickle.loads(HOSTILE[case](mark))
        assert mark.exists(), case


# --- hostile archives ---------------------------------------------------------------------------------------------


def described(num_items: int, shape: tuple[int, ...], *, offset: int = 0, key: str = "0") -> bytes:
    """The pickle of one tensor, as torch writes it but with any numbers."""
    tensors = {"0.0.linear.weight": Calls(torch._utils._rebuild_tensor_v2, 0)}
    strides = (shape[1], 1) if len(shape) == 2 else (1,) * len(shape)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", num_items) if value == "the storage" else None

    tensors["0.0.linear.weight"].call = (
        torch._utils._rebuild_tensor_v2,
        ("the storage", offset, shape, strides, False, OrderedDict()),
    )
    raw = io.BytesIO()
    Pickler(raw, 2).dump(tensors)
    return raw.getvalue()


SQUARE = E * E
STORED = ("data/0", bytes(SQUARE * 4))


def test_the_archives_of_these_tests_are_those_that_torch_writes(tmp_path):
    unpickle_heads(archive(tmp_path, described(SQUARE, (E, E)), STORED))
    assert check_heads(tmp_path, BASE).info.num_heads == 1


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no zip": (lambda folder: (folder / PICKLE_FILE).write_bytes(b"\x80\x02}."), "damaged"),
    "an empty file": (lambda folder: (folder / PICKLE_FILE).write_bytes(b""), "damaged"),
    "no pickle": (lambda folder: zipfile.ZipFile(folder / PICKLE_FILE, "w").close(), "no part 'data.pkl'"),
    "no storage": (lambda folder: archive(folder, described(SQUARE, (E, E))), "no part 'data/0'"),
    "a storage elsewhere": (
        lambda folder: archive(folder, described(SQUARE, (E, E), key="../../etc/passwd"), STORED),
        "no part 'data/../../etc/passwd'",
    ),
    "less stored than told": (
        lambda folder: archive(folder, described(2 * SQUARE, (E, E)), STORED),
        f"needs {SQUARE * 8} bytes and has {SQUARE * 4}",
    ),
    "a huge storage": (lambda folder: archive(folder, described(1 << 40, (1 << 20, 1 << 20)), STORED), "and has"),
    "a shape beyond the storage": (
        lambda folder: archive(folder, described(SQUARE, (E, 2 * E)), STORED),
        "reaches beyond its storage",
    ),
    "an offset beyond the storage": (
        lambda folder: archive(folder, described(SQUARE, (E, E), offset=1), STORED),
        "reaches beyond its storage",
    ),
    "a negative offset": (
        lambda folder: archive(folder, described(SQUARE, (E, E), offset=-1), STORED),
        "heads do not have",
    ),
    "another order of bytes": (
        lambda folder: archive(folder, described(SQUARE, (E, E)), STORED, ("byteorder", b"big")),
        "little-endian",
    ),
    "a compressed part": (
        lambda folder: archive(folder, described(SQUARE, (E, E)), STORED, compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "a pickle too long": (lambda folder: archive(folder, bytes(2 << 20)), "describes its tensors in 2097152 bytes"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_bad_archives_are_refused(tmp_path, case):
    make, words = BAD_ARCHIVES[case]
    make(tmp_path)
    assert words in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_part_that_comes_twice_is_refused(tmp_path):
    assert "two parts 'data/0'" in refusal(archive(tmp_path, described(SQUARE, (E, E)), STORED, STORED))


def test_a_part_that_is_not_what_was_written_is_refused(tmp_path):
    folder = archive(tmp_path, described(SQUARE, (E, E)), ("data/0", b"abcd" * SQUARE))
    raw = (folder / PICKLE_FILE).read_bytes()
    (folder / PICKLE_FILE).write_bytes(raw.replace(b"abcdabcd", b"abcdabce", 1))
    assert "damaged" in refusal(folder)


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """Bytes flipped at random: no error but ours, and nothing but heads comes out."""
    source = saved(tmp_path / "good", {name: torch.from_numpy(one) for name, one in medusa_v2(1).items()})
    good, dice = (source / PICKLE_FILE).read_bytes(), random.Random(0)
    refused = 0
    for turn in range(200):
        folder = tmp_path / str(turn)
        folder.mkdir()
        raw = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        (folder / PICKLE_FILE).write_bytes(raw[: dice.randrange(len(raw))] if turn % 10 == 0 else raw)
        try:
            unpickle_heads(folder)
        except AdapterRejected:
            refused += 1
    assert refused > 20
