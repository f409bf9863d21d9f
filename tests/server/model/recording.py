"""A stand-in for CUDA graphs: it runs what was recorded again, and refuses when that is not the same work.

A graph repeats launches with the shapes, numbers and addresses it saw. Here every repetition is compared with the
first run: each torch op and each kernel launch, with its grid, its numbers, the shapes and strides of its tensors, and
the addresses of the integers a kernel reads (the step's inputs).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

Tape = list[tuple[Any, ...]]


class TapeRecorder:
    """Implements `perseid_kernels.backend.Recorder`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[object] = []  # that recordings were given, in order
        self.num_replays = 0
        self._tape: Tape | None = None
        launch = interpreter.GridExecutor.__call__

        def taped(executor: Any, *args: Any, **kwargs: Any) -> None:
            tape, self._tape = self._tape, None  # what the interpreter does inside a launch is not on the tape
            if tape is not None:
                numbers = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
                tape.append((executor.fn.__name__, executor.grid, *map(_launched, args), numbers))
            launch(executor, *args, **kwargs)
            self._tape = tape

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", taped)

    def new_pool(self) -> object:
        return object()

    def record(self, run: Callable[[], object], pool: object = None) -> Callable[[], None]:
        self.pools.append(pool)
        first = self._taped(run)
        assert first, "nothing was recorded"

        def replay() -> None:
            self.num_replays += 1
            again = self._taped(run)
            assert again == first, "a graph would have repeated other work"

        return replay

    def note(self, entry: tuple[Any, ...]) -> None:
        if self._tape is not None:
            self._tape.append(entry)

    def _taped(self, run: Callable[[], object]) -> Tape:
        self._tape = tape = []
        try:
            with _Noting(self):
                run()
        finally:
            self._tape = None
        return tape


class _Noting(TorchDispatchMode):
    def __init__(self, recorder: TapeRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recorder.note((str(func), *map(_shaped, args)))
        return func(*args, **(kwargs or {}))


def _shaped(value: Any) -> Any:
    """An argument, a tensor by what a graph fixes of it."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(map(_shaped, value)) if isinstance(value, list | tuple) else value


def _launched(value: Any) -> Any:
    """The same for a kernel's; integers also by their address."""
    if isinstance(value, Tensor) and value.dtype in {torch.int32, torch.int64}:
        return *_shaped(value), value.data_ptr()
    return _shaped(value)
