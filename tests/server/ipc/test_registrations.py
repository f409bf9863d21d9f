"""What one engine was told of heads, the next is told too."""

from perseid_server.engine.messages import AdapterState, ForgetHeads, RegisterHeads, StepOutputs, ToEngine
from perseid_server.ipc.registrations import Registrations


class Told(Registrations):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[ToEngine] = []

    def _tell(self, message: ToEngine) -> None:
        self.told.append(message)


def test_heads_are_told_and_told_again_until_they_are_forgotten() -> None:
    engine = Told()
    engine.register_heads("h1", "/h1")
    engine.register_heads("h2", "/h2")
    engine.forget_heads("h1")
    engine.forget_heads("h1")  # nobody minds
    assert engine.told == [
        RegisterHeads("h1", "/h1"),
        RegisterHeads("h2", "/h2"),
        ForgetHeads("h1"),
        ForgetHeads("h1"),
    ]
    assert list(engine.registrations()) == [RegisterHeads("h2", "/h2")]


def test_the_state_of_heads_is_kept_while_they_are_known() -> None:
    engine = Told()
    engine.register_heads("h", "/h")
    states = tuple(AdapterState(version, "device", None) for version in ("h", "gone"))
    engine._take_states(StepOutputs(adapters=states))
    assert engine.adapter_states == {"h": states[0]}
    engine.forget_heads("h")
    assert engine.adapter_states == {}
