"""What an engine must know beside requests, remembered for the next engine process: adapters, gate sets, heads."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

from perseid_server.engine.messages import (
    AdapterState,
    ForgetAdapter,
    ForgetGateSet,
    ForgetHeads,
    PinAdapter,
    RegisterAdapter,
    RegisterGateSet,
    RegisterHeads,
    StepOutputs,
    ToEngine,
)


class Registrations(ABC):
    """Tells one engine after another what is registered."""

    def __init__(self) -> None:
        self._adapters: dict[str, RegisterAdapter] = {}
        self._gate_sets: dict[str, RegisterGateSet] = {}
        self._heads: dict[str, RegisterHeads] = {}
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

    def register_heads(self, version: str, path: str) -> None:
        """Make Medusa heads known to this engine and to those that follow it."""
        message = RegisterHeads(version, path)
        self._heads[version] = message
        self._tell(message)

    def forget_heads(self, version: str) -> None:
        """Nobody drafts with these heads any more."""
        self._heads.pop(version, None)
        self.adapter_states.pop(version, None)
        self._tell(ForgetHeads(version))

    @abstractmethod
    def _tell(self, message: ToEngine) -> None:
        """Send a message if there is an engine; a later one gets all `registrations`."""

    def registrations(self) -> Iterator[ToEngine]:
        """What a new engine has to be told, adapters before the gate sets that choose among them."""
        yield from self._adapters.values()
        yield from self._gate_sets.values()
        yield from self._heads.values()

    def _take_states(self, step: StepOutputs) -> None:
        """Remember where things are. An engine may still speak of what has been forgotten meanwhile."""
        for state in step.adapters:
            if any(state.version in known for known in (self._adapters, self._gate_sets, self._heads)):
                self.adapter_states[state.version] = state
