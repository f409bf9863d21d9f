"""Labels go to the busiest, come back from those that have gone, and no series ever goes down."""

import pytest
from prometheus_client import CollectorRegistry, Counter

from perseid_server.frontend.metrics.adapter_labels import AdapterLabels, label_text


class Server:
    """Adapters that are loaded and used, on a clock of its own, counted in one metric."""

    def __init__(self, capacity: int = 2) -> None:
        self.now = 0.0
        self.loaded: set[str] = set()
        self.labels = AdapterLabels(capacity, lambda: self.now)
        self.counter = Counter("uses", "Uses.", ("adapter",), registry=CollectorRegistry())
        self.labels.follow(self.counter)
        self.labels.watch(lambda: self.loaded)

    def use(self, name: str, tokens: float = 1.0) -> str:
        self.loaded.add(name)
        label = self.labels.of(name, tokens)
        self.counter.labels(label).inc(tokens)
        return label

    def wait(self, seconds: float) -> None:
        """With a review every ten seconds, as scrapes bring."""
        for _ in range(int(seconds / 10)):
            self.now += 10
            self.labels.review()

    def series(self) -> dict[str, float]:
        return {
            sample.labels["adapter"]: sample.value
            for sample in next(iter(self.counter.collect())).samples
            if sample.name == "uses_total"
        }


def test_the_first_are_told_apart_and_the_others_together() -> None:
    server = Server()
    assert [server.use(name) for name in "abcd"] == ["a", "b", "other", "other"]
    assert server.series() == {"a": 1, "b": 1, "other": 2}


def test_an_adapter_that_becomes_busy_later_gets_the_label_of_the_least_busy() -> None:
    server = Server()
    server.use("a", 100)
    server.use("b", 10)
    assert server.use("late", 300) == "other"
    server.wait(10)
    assert server.use("late", 5) == "late"
    assert server.use("a") == "a"
    assert server.use("b") == "other"
    assert server.series() == {"a": 101, "b": 10, "late": 5, "other": 301}  # b stands still, for a last scrape
    server.wait(150)
    assert server.series() == {"a": 101, "late": 5, "other": 301}


def test_equals_do_not_take_labels_from_each_other() -> None:
    server = Server()
    for _ in range(30):
        for name in "abcd":
            server.use(name, 10)
        server.use("c", 1)
        server.wait(10)
    assert set(server.series()) == {"a", "b", "other"}


def test_traffic_of_long_ago_holds_no_label() -> None:
    server = Server(capacity=1)
    server.use("old", 1000)
    server.wait(6000)  # ten half-lives
    server.use("new", 30)
    server.wait(10)
    assert server.use("new") == "new"


def test_a_name_that_comes_back_while_its_series_linger_goes_on_where_it_stood() -> None:
    server = Server(capacity=1)
    server.use("a", 5)
    server.loaded.discard("a")
    server.wait(20)
    assert server.use("a") == "a"
    server.wait(300)
    assert server.series() == {"a": 6}


def test_labels_of_unloaded_adapters_vanish_with_their_series() -> None:
    server = Server()
    server.use("a", 5)
    server.loaded.clear()
    server.wait(100)
    assert server.series() == {"a": 5}
    server.wait(100)
    assert server.series() == {}
    assert server.use("b") == "b"


def test_names_that_come_and_go_by_the_thousands_leave_nothing_behind() -> None:
    server = Server(capacity=5)
    most = 0
    for number in range(5000):
        server.use(f"adapter-{number}", 3)
        server.loaded.discard(f"adapter-{number - 2}")
        server.now += 1
        most = max(most, len(server.series()))
    assert 5 + 1 < most <= 2 * 5 + 1
    server.loaded.clear()
    server.wait(600)
    assert set(server.series()) == {"other"}
    assert not server.labels._traffic


def test_a_name_that_is_gone_is_given_no_label_that_a_loaded_one_could_have() -> None:
    server = Server(capacity=1)
    server.use("first", 100)
    server.use("gone", 50)
    server.loaded.clear()
    server.use("here", 1)
    server.wait(10)
    assert server.use("here") == "here"


def test_traffic_is_remembered_of_so_many_names_only() -> None:
    server = Server()
    for number in range(1500):
        server.use(f"adapter-{number}", 3)
    server.wait(10)
    assert len(server.labels._traffic) == 1000 + 2
    server.wait(36000)
    assert set(server.labels._traffic) == {"adapter-0", "adapter-1"}  # who have the labels


def test_series_never_go_down_while_they_last() -> None:
    server = Server(capacity=3)
    before: dict[str, float] = {}
    for turn in range(2000):
        busy = f"n{turn // 100 % 8}"  # another one is busy every hundred turns
        server.use(busy, 7)
        server.use(f"n{turn % 8}", 1)
        server.now += 1
        now = server.series()
        assert all(now[name] >= before[name] for name in now.keys() & before.keys())
        before = now
    assert len(before) > 2


@pytest.mark.parametrize("name", ["other", "base", "auto", "blend"])
def test_no_adapter_is_taken_for_what_is_none(name: str) -> None:
    assert label_text(name) == f"adapter:{name}"
    assert Server().use(name) == f"adapter:{name}"
