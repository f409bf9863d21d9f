"""Folders that somebody who means harm could put below an adapter root, and the words that each is refused with."""

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from perseid_router import gate_set
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES
from perseid_server.speculation import heads_config
from tests.server.meteora_folder import write_meteora
from tests.server.speculation.heads_folders import write_heads
from tests.server.stack import certain_router, write_adapter, write_gate_set

Tensor = tuple[str, list[int], bytes]
Trick = Callable[[Path], object]

NO_VERSION = "0" * 64


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, length: int | None = None) -> None:
    """A safetensors file that may say anything of its tensors."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told) if length is None else length) + told + data)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: ("F32", list(values.shape), values.tobytes()) for name, values in load_file(path).items()}


# --- what the files say ---------------------------------------------------------------------------------------------


def config(**changes: object) -> Trick:
    def write(folder: Path) -> None:
        path = write_adapter(folder) / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def config_text(text: str) -> Trick:
    return lambda folder: (write_adapter(folder) / CONFIG_FILE).write_text(text)


def weights(change: Callable[[dict[str, Tensor]], object], **config: object) -> Trick:
    """An adapter whose tensors are changed after they were written."""

    def write(folder: Path) -> None:
        path = write_adapter(folder) / WEIGHTS_FILE
        tensors = tensors_of(path)
        change(tensors)
        write_tensors(path, tensors)
        told = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(told | config))

    return write


def first(**changes: object) -> Trick:
    """An adapter whose first tensor is another: dtype, shape, or raw bytes."""

    def change(tensors: dict[str, Tensor]) -> None:
        name, (dtype, shape, raw) = next(iter(tensors.items()))
        told = {"dtype": dtype, "shape": shape, "raw": raw} | changes
        tensors[name] = (told["dtype"], told["shape"], told["raw"])

    return weights(change)


def value(number: float) -> Trick:
    def change(tensors: dict[str, Tensor]) -> None:
        name, (dtype, shape, raw) = next(iter(tensors.items()))
        tensors[name] = (dtype, shape, raw[:-4] + struct.pack("<f", number))

    return weights(change)


def renamed(change: Callable[[str], str]) -> Trick:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return weights(rename)


def without_ranks(tensors: dict[str, Tensor]) -> None:
    for name, (_, shape, _) in tensors.items():
        tensors[name] = ("F32", [0 if size == 2 else size for size in shape], b"")


def header(length: int, size: int) -> Trick:
    """Weights that announce a header of that length, in a sparse file."""

    def write(folder: Path) -> None:
        with (write_adapter(folder) / WEIGHTS_FILE).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(size)

    return write


def header_text(text: bytes) -> Trick:
    def write(folder: Path) -> None:
        (write_adapter(folder) / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))

    return write


def sparse(name: str, size: int) -> Trick:
    return lambda folder: os.truncate(write_adapter(folder) / name, size)


def pickled(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def router_of_nothing(folder: Path) -> None:
    """A request router with an empty tensor of a shape that no array can have."""
    path = write_gate_set(folder, {"a": NO_VERSION}, router=certain_router("a")) / gate_set.WEIGHTS_FILE
    tensors = tensors_of(path) | {"request_router.bias": ("F32", [0, 2**47, 2**47], b"")}
    write_tensors(path, tensors)


def heads_with(name: str, tensor: Tensor) -> Trick:
    def write(folder: Path) -> None:
        path = write_heads(folder) / heads_config.TENSORS_FILE
        write_tensors(path, tensors_of(path) | {name: tensor})

    return write


def meteora_with(**changes: object) -> Trick:
    def write(folder: Path) -> None:
        path = write_meteora(folder) / "meteora.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def meteora_named(name: str) -> Trick:
    def write(folder: Path) -> None:
        path = write_meteora(folder) / "meteora.json"
        told = json.loads(path.read_text())
        told["adapters"][0]["name"] = name
        path.write_text(json.dumps(told))

    return write


def nested(depth: int) -> str:
    return '{"peft_type": "LORA", "r": ' + "[" * depth + "]" * depth + "}"


HOSTILE: dict[str, tuple[Trick, str]] = {
    "a config of 100 GB": (sparse(CONFIG_FILE, 100 << 30), "has 107374182400 bytes; the limit is"),
    "a config beyond its limit": (sparse(CONFIG_FILE, MAX_CONFIG_BYTES + 1), f"the limit is {MAX_CONFIG_BYTES}"),
    "weights of 100 GB": (sparse(WEIGHTS_FILE, 100 << 30), "has 107374182400 bytes; the limit is"),
    "a header of 2^63 bytes": (header(1 << 63, 1 << 20), f"a header of {1 << 63} bytes"),
    "a header of 2^64 - 1 bytes": (header((1 << 64) - 1, 1 << 20), f"a header of {(1 << 64) - 1} bytes"),
    "room for ten million tensors": (header(16 << 20, 20 << 20), "a header of"),
    "more tensors than any adapter has": (
        header_text(b"{" + b",".join(b'"%d":{}' % number for number in range(70_000)) + b"}"),
        "lists 70000 tensors",
    ),
    "a header nested deeply": (header_text(b'{"x":' + b"[" * 70_000), "nested too deeply"),
    "a config nested deeply": (config_text(nested(100_000)), "nested too deeply"),
    "a config with a number of 100,000 digits": (config_text('{"r": ' + "9" * 100_000 + "}"), "not valid JSON"),
    "a config that says r twice": (config_text('{"peft_type": "LORA", "r": 2, "r": 4}'), "'r' appears twice"),
    "a shape beyond any file": (first(shape=[1 << 40, 1 << 40]), "no file could hold it"),
    "an empty shape beyond any file": (first(shape=[0, 1 << 47, 1 << 47], raw=b""), "no file could hold it"),
    "a size below zero": (first(shape=[-2, -16]), "non-negative integers"),
    "less data than the shape takes": (first(raw=b"1234"), "takes 4 bytes"),
    "doubles": (first(dtype="F64"), "type 'F64'"),
    "bytes that are called floats": (first(dtype="I8"), "type 'I8'"),
    "a type in small letters": (first(dtype="f32"), "type 'f32'"),
    "half precision that is called single": (first(dtype="F16"), "where F16"),
    "NaN": (value(float("nan")), "holds NaN"),
    "Inf": (value(float("-inf")), "holds Inf"),
    "a scale beyond float32": (config(lora_alpha=1e39), "exceeds float32"),
    "rank 0 in the config": (config(r=0), "expected an integer from 1 to"),
    "rank 0 in the tensors": (weights(without_ranks), "has rank 0; the config says 2"),
    "rank 0 in both": (weights(without_ranks, r=0), "expected an integer from 1 to"),
    "rank 10^9": (config(r=10**9), "expected an integer from 1 to"),
    "a rank of 400 digits": (config(r=10**400), "expected an integer from 1 to"),
    "a rank that no tensor has": (config(r=64), "has rank 2; the config says 64"),
    "a layer in Arabic digits": (renamed(lambda name: name.replace("layers.1.", "layers.1\u0660.")), "unknown tensor"),
    "a projection in full width": (renamed(lambda name: name.replace("q_proj", "\uff51_proj")), "unknown tensor"),
    "a projection with a Cyrillic o": (renamed(lambda name: name.replace("proj", "pr\u043ej")), "unknown tensor"),
    "a path for a name": (renamed(lambda name: f"../../{name}"), "unknown tensor"),
    "a pickle": (pickled, "adapter_model.bin is not read, because such files can run code"),
    "code of its own": (config(auto_map={"AutoModel": "evil.py--Evil"}), "unknown key 'auto_map'"),
    "trust_remote_code": (config(trust_remote_code=True), "unknown key 'trust_remote_code'"),
    "another kind of adapter": (config(peft_type="LORA\u202e"), "is not supported"),
    "a router of nothing": (router_of_nothing, "no file could hold it"),
    "a head far away": (heads_with("99.0.linear.weight", ("F32", [0], b"")), "at most 8 heads"),
    "a head in Arabic digits": (heads_with("\u0663.0.linear.weight", ("F32", [0], b"")), "unknown tensor"),
    "a head of nothing": (heads_with("3.0.linear.weight", ("F32", [0, 0], b"")), "has the shape [0, 0]"),
    "adapters by the thousand": (meteora_with(adapters=[{}] * 1000), "expected a list of 1 to 512"),
    "a checkpoint's adapter called ..": (meteora_named(".."), "expected 1 to 128 letters"),
    "a checkpoint's adapter with a path": (meteora_named("a/../../b"), "expected 1 to 128 letters"),
    "a checkpoint's adapter below another name": (meteora_named("a/b"), "without '/'"),
    "a checkpoint's k": (meteora_with(k=10**30), "k "),
}

WORDS = {case: words for case, (_, words) in HOSTILE.items()}


def write(case: str, folder: Path) -> Path:
    """The folder of a case."""
    HOSTILE[case][0](folder)
    return folder


# --- what the files are ---------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    """A Unix socket; the name is short enough only from its own folder."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Trick:
    return lambda path: path.symlink_to(target)


SPECIAL: dict[str, Trick] = {
    "a pipe": pipe,
    "a socket": listening,
    "a folder": Path.mkdir,
    "endless zeros": link_to("/dev/zero"),
    "a terminal": link_to("/dev/tty"),
    "its own memory": link_to("/proc/self/mem"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}

KINDS: dict[str, tuple[Trick, tuple[str, ...]]] = {
    "adapter": (write_adapter, (CONFIG_FILE, WEIGHTS_FILE)),
    "gates": (
        lambda folder: write_gate_set(folder, {"a": NO_VERSION}),
        (gate_set.CONFIG_FILE, gate_set.WEIGHTS_FILE),
    ),
    "heads": (write_heads, (heads_config.TENSORS_FILE, heads_config.CONFIG_FILE)),
    "checkpoint": (write_meteora, ("meteora.json", "model.safetensors")),
}


def write_special(folder: Path, kind: str, file: str, special: str) -> Path:
    """A good folder of that kind, one of whose files is something else."""
    KINDS[kind][0](folder)
    (folder / file).unlink(missing_ok=True)
    SPECIAL[special](folder / file)
    return folder


def save_noise(path: Path, nbytes: int) -> None:
    """A good file of one large tensor that no adapter has."""
    save_file({"noise": np.zeros(nbytes // 4, np.float32)}, path)
