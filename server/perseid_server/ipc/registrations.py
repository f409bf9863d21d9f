"""What an engine must know beside requests, remembered for the next engine process: adapters and gate sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

from perseid_server.engine.messages import (
    AdapterState,
    ForgetAdapter,
    ForgetGateSet,
    PinAdapter,
    RegisterAdapter,
    RegisterGateSet,
    StepOutputs,
    ToEngine,
)


class Registrations(ABC):
    """Tells one engine after another what is registered."""

    def __init__(self) -> None:
        self._adapters: dict[str, RegisterAdapter] = {}
        self._gate_sets: dict[str, RegisterGateSet] = {}
        self.adapter_states: dict[str, AdapterState] = {}

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None:
        """Make a version known to this engine and to those that follow it."""
        message = RegisterAdapter(version, path, pinned)
        self._adapters[version] = message
        self._tell(message)

    def pin_adapter(self, version: str, *, pinned: bool) -> None:
        """Keep a version on the device, or let it go."""
        self._adapters[version] = replace(self._adapters[version], pinned=pinned)
        self._tell(PinAdapter(version, pinned))

    def forget_adapter(self, version: str) -> None:
        """Let a version go with its last user."""
        self._adapters.pop(version, None)
        self.adapter_states.pop(version, None)
        self._tell(ForgetAdapter(version))

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool = False
    ) -> None:
        """Make a gate set known to this engine and to those that follow it; again: change its pin."""
        message = RegisterGateSet(version, path, adapters, null, pinned)
        self._gate_sets[version] = message
        self._tell(message)

    def forget_gate_set(self, version: str) -> None:
        """Let a gate set go with its last user."""
        self._gate_sets.pop(version, None)
        self.adapter_states.pop(version, None)
        self._tell(ForgetGateSet(version))

    @abstractmethod
    def _tell(self, message: ToEngine) -> None:
        """Send a message if there is an engine; a later one gets all `registrations`."""

    def registrations(self) -> Iterator[ToEngine]:
        """What a new engine has to be told, adapters before the gate sets that choose among them."""
        yield from self._adapters.values()
        yield from self._gate_sets.values()

    def _take_states(self, step: StepOutputs) -> None:
        """Remember where things are. An engine may still speak of what has been forgotten meanwhile."""
        for state in step.adapters:
            if state.version in self._adapters or state.version in self._gate_sets:
                self.adapter_states[state.version] = state
