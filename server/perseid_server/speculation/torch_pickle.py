"""What `torch.save` writes of a dictionary of tensors, read without torch and without running any of it.

A pickle is a program for a stack machine: its GLOBAL names any function of any module, its REDUCE calls it. The machine
here has the instructions that tensors need and no others, and looks no name up: six names are marks that it knows,
every other is refused. Nothing is imported, called or set on the pickle's word. Standard library only.
Format: torch/serialization.py (`_save`), https://docs.python.org/3/library/pickletools.html.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from perseid_server.errors import AdapterRejected, quoted

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORAGES: Mapping[str, str] = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_KNOWN = frozenset({*_STORAGES, _DICT, _TENSOR, _PARAMETER})
_MARK = object()


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array of numbers in a file of its own."""

    dtype: str  # a key of ITEM_BYTES
    key: str  # its file
    num_items: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a part of a storage, its rows one after the other."""

    storage: Storage
    offset: int  # items from the start of the storage
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    name: str  # one of _KNOWN


class _Refused(ValueError):
    pass


def read_tensors(raw: bytes) -> dict[str, StoredTensor]:
    """The tensors of a pickled dictionary by name. AdapterRejected for anything else."""
    try:
        return _all_tensors(_Machine().run(raw))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        why = error if isinstance(error, _Refused) else "it is damaged"
        raise AdapterRejected(f"the pickle is not read: {why}; expected the state_dict of Medusa heads") from error


def _all_tensors(content: Any) -> dict[str, StoredTensor]:
    if not isinstance(content, dict) or not content:
        raise _Refused("it holds no dictionary of tensors")
    for name, value in content.items():
        if not isinstance(value, StoredTensor):
            raise _Refused(f"{quoted(name)} is not a tensor")
    return content


@dataclass(slots=True)
class _Machine:
    """Pickle's stack machine, as far as `torch.save` uses it for dictionaries of tensors."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, raw: bytes) -> Any:
        """What the program leaves. ValueError, IndexError, KeyError or TypeError when it is not such a one."""
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "STOP":
                return self.stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise _Refused(f"it uses {opcode.name}, which tensors do not need")
            step(self, argument)
        raise _Refused("it has no end")

    def push(self, value: Any) -> None:
        """Put on the stack."""
        self.stack.append(value)

    def take(self, count: int) -> tuple[Any, ...]:
        """Take so many off the stack, the lowest first."""
        return tuple(reversed([self.stack.pop() for _ in range(count)]))

    def take_to_mark(self) -> tuple[Any, ...]:
        """Take all above the last mark, and the mark."""
        taken: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            taken.append(value)
        return tuple(reversed(taken))

    def look_up(self, name: str) -> None:
        """GLOBAL."""
        if name not in _KNOWN:
            raise _Refused(f"it asks for {quoted(name.replace(' ', '.'))}, which could run code")
        self.push(_Global(name))

    def reduce(self) -> None:
        """REDUCE: build what a known name stands for."""
        called, arguments = self.take(2)
        if called == _Global(_DICT) and arguments == ():
            self.push({})
        elif called == _Global(_TENSOR):
            self.push(_tensor(*arguments[:4]))
        elif called == _Global(_PARAMETER) and isinstance(arguments[0], StoredTensor):
            self.push(arguments[0])
        else:
            raise _Refused("it calls what cannot be called")

    def load_storage(self) -> None:
        """BINPERSID."""
        kind, storage, key, _device, num_items = self.stack.pop()
        dtype = _STORAGES.get(storage.name) if isinstance(storage, _Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or not _are_counts(num_items):
            raise _Refused("a tensor's storage is not described as torch does")
        self.push(Storage(dtype, key, num_items))

    def set_items(self, items: tuple[Any, ...]) -> None:
        """SETITEM, SETITEMS: keys and values in turn."""
        target = self.stack[-1]
        if type(target) is not dict or not all(isinstance(key, str) for key in items[::2]):
            raise _Refused("a dictionary has keys that are not names")
        target.update(zip(items[::2], items[1::2], strict=True))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _Refused("a tensor is not described as torch does")
    if not _are_counts(offset, *shape, *strides) or len(strides) != len(shape) or len(shape) > 2:
        raise _Refused("a tensor has a shape that heads do not have")
    if any(
        size > 1 and stride != prod(shape[i + 1 :]) for i, (size, stride) in enumerate(zip(shape, strides, strict=True))
    ):
        raise _Refused("a tensor's rows do not lie one after the other; save it with .contiguous()")
    if offset + prod(shape) > storage.num_items:
        raise _Refused("a tensor reaches beyond its storage")
    return StoredTensor(storage, offset, shape)


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda _, __: None,
    "MARK": lambda machine, _: machine.push(_MARK),
    "GLOBAL": _Machine.look_up,
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.stack.pop() and None,  # attributes, which a dictionary here has none of
    "BINPERSID": lambda machine, _: machine.load_storage(),
    "BINPUT": lambda machine, place: machine.memo.__setitem__(place, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, place: machine.memo.__setitem__(place, machine.stack[-1]),
    "BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "BINUNICODE": _Machine.push,
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "LONG1": _Machine.push,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "TUPLE": lambda machine, _: machine.push(machine.take_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.take_to_mark()),
}
