"""Lines of waiting sequences: whose turn it is in a round, and what is passed over with a closed line."""

from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.fairness import Shares
from perseid_server.engine.messages import Submit
from perseid_server.engine.sequence import Sequence
from perseid_server.engine.waiting import Waiting
from perseid_server.model.sampling_params import SamplingParams


class Queue:
    """Waiting sequences by name."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.waiting = Waiting(self.shares)
        self.by_name: dict[str, Sequence] = {}

    def add(self, name: str, adapter: str | None = None, *, first: bool = False) -> None:
        request = Submit(name, (1, 2, 3), SamplingParams(max_tokens=4), Adaptation.of(adapter))
        sequence = self.by_name[name] = Sequence(request, arrival=len(self.by_name))
        self.shares.enter(sequence)
        self.shares.wait(sequence)
        self.waiting.add(sequence, first=first)

    def round(self, *, closing: str = "") -> list[str]:
        """Names in the order of one round, in which the line of a sequence is closed when it comes."""
        told = []
        for sequence in self.waiting.in_order():
            told.append(sequence.id)
            if sequence.id == closing:
                self.waiting.close_line(sequence)
        return told


def test_a_closed_line_is_passed_over_for_one_round():
    queue = Queue()
    for name, adapter in (("a0", "a"), ("b0", "b"), ("a1", "a"), ("a2", "a"), ("b1", "b")):
        queue.add(name, adapter)
    assert queue.round() == ["a0", "b0", "a1", "a2", "b1"]
    assert queue.round(closing="a0") == ["a0", "b0", "b1"]
    assert queue.round() == ["a0", "b0", "a1", "a2", "b1"]


def test_who_goes_first_is_before_all_lines():
    queue = Queue()
    queue.add("a0", "a")
    queue.add("b0", "b")
    queue.add("b1", "b")
    queue.waiting.put_first(queue.by_name["b1"])
    assert queue.round() == ["b1", "a0", "b0"]


def test_what_is_waited_for_follows_who_waits():
    queue = Queue()
    assert queue.waiting.adapters == ()
    queue.add("base")
    assert queue.waiting.adapters == ()
    queue.add("a0", "a")
    assert queue.waiting.adapters == ("a",)
    queue.add("a1", "a")
    queue.add("b0", "b", first=True)
    assert queue.waiting.adapters == ("a", "b")
    for name, left in (("a0", ("a", "b")), ("b0", ("a",)), ("a1", ())):
        queue.waiting.remove(queue.by_name[name])
        assert queue.waiting.adapters == left
    assert [one.id for one in queue.waiting] == ["base"]
