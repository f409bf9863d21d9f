"""Which heads draft for whom."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from perseid_server.adapters.lora import AdapterInfo
from perseid_server.adapters.manifest import Entry
from perseid_server.engine.adaptation import BASE, Adaptation, Routing
from perseid_server.engine.messages import AdapterState
from perseid_server.frontend.heads import HeadsChooser, HeadsFor, whom
from perseid_server.frontend.loaded import Loaded, LoadedAdapter, LoadedHeads
from perseid_server.frontend.loaded_names import LoadedNames
from perseid_server.speculation.heads_file import HeadsInfo

A, B = "a" * 64, "b" * 64


class Names(LoadedNames):
    def __init__(self, *loaded: Loaded) -> None:
        super().__init__()
        self._loaded = {one.name: one for one in loaded}


def adapter(name: str, version: str) -> LoadedAdapter:
    return LoadedAdapter(Entry(name, version, "s", 0.0), AdapterInfo("LoRA", 2, 1, ("q_proj",), (0,), 8, 32, None))


def heads(name: str, at: float = 1.0, *, by_name: str | None = None, by_hash: str | None = None) -> LoadedHeads:
    info = HeadsInfo(4, 1, "Medusa v2", shares_lm_head=True, adapter=by_hash, num_draft_tokens=9, nbytes=1)
    return LoadedHeads(Entry(name, "h" * 64, "s", at, kind="heads", adapter=by_name), info)


def chosen(loaded: Sequence[Loaded], adaptation: Adaptation) -> str | None:
    found = HeadsChooser(Names(*loaded)).heads_for(adaptation)
    return None if found is None else found.name


def test_heads_that_the_engine_cannot_load_are_passed_over() -> None:
    good, newer = heads("good", at=1.0), heads("newer", at=2.0)
    states: dict[str, AdapterState] = {}
    newer = replace(newer, entry=replace(newer.entry, version="n" * 64))
    chooser = HeadsChooser(Names(good, newer), states)
    assert chooser.heads_for(BASE) == newer
    states[newer.version] = AdapterState(newer.version, "disk", "out of memory")
    assert chooser.heads_for(BASE) == good


OF_ALL = [
    adapter("a", A),
    adapter("b", B),
    heads("for base"),
    heads("for a", by_name="a"),
    heads("for b", by_hash=B),
]
ROUTED = Adaptation(routing=Routing("g" * 64, (A, B), 2, 1.0))


@pytest.mark.parametrize(
    ("adaptation", "name"),
    [
        (BASE, "for base"),
        (Adaptation.of(A), "for a"),
        (Adaptation.of(B), "for b"),
        (Adaptation.of("c" * 64), "for base"),
        (Adaptation(((A, 0.5),)), "for base"),
        (Adaptation(((A, 1.0), (B, 1.0))), "for base"),
        (ROUTED, "for base"),
    ],
)
def test_an_adapter_alone_has_its_own_heads_and_all_else_the_bases(adaptation, name):
    assert chosen(OF_ALL, adaptation) == name


def test_without_heads_of_the_base_the_others_have_none():
    loaded = [one for one in OF_ALL if one.name != "for base"]
    assert chosen(loaded, Adaptation.of(A)) == "for a"
    assert chosen(loaded, BASE) is chosen(loaded, ROUTED) is chosen(loaded, Adaptation.of("c" * 64)) is None
    assert chosen([], Adaptation.of(A)) is None


def test_a_name_follows_the_version_and_a_hash_does_not():
    replaced = [adapter("a", "c" * 64), adapter("b", "d" * 64), heads("n", by_name="a"), heads("h", by_hash=B)]
    assert chosen(replaced, Adaptation.of("c" * 64)) == "n"
    assert chosen(replaced, Adaptation.of(A)) is None
    assert chosen(replaced, Adaptation.of("d" * 64)) is None
    assert chosen(replaced, Adaptation.of(B)) == "h"  # a request that began before the name was replaced


def test_the_name_given_counts_more_than_the_hash_in_the_file():
    loaded = [adapter("a", A), adapter("b", B), heads("h", by_name="a", by_hash=B)]
    assert chosen(loaded, Adaptation.of(A)) == "h"
    assert chosen(loaded, Adaptation.of(B)) is None


def test_of_several_the_last_loaded_drafts():
    loaded = [adapter("a", A), heads("new", 3.0), heads("old", 2.0)]
    assert chosen(loaded, BASE) == "new"  # though it took an older name's place in the list
    loaded += [heads("by hash", 1.0, by_hash=A), heads("by name", 1.5, by_name="a")]
    assert chosen(loaded, Adaptation.of(A)) == "by name"


def test_heads_are_bound_to_adapters_alone():
    """A name that stands for something else by now serves nobody."""
    loaded = [heads("a"), heads("h", by_name="a")]
    assert chosen(loaded, Adaptation.of("h" * 64)) == "a"
    assert whom(loaded[1], Names(*loaded)) == HeadsFor("a", None, in_use=False)


def test_whom_they_are_for():
    names = Names(*OF_ALL)
    assert [whom(one, names) for one in names.heads()] == [
        HeadsFor(None, None, in_use=True),
        HeadsFor("a", A, in_use=True),
        HeadsFor("b", B, in_use=True),
    ]
    assert whom(heads("h", by_name="gone"), names) == HeadsFor("gone", None, in_use=False)
    assert whom(heads("h", by_hash="c" * 64), names) == HeadsFor(None, "c" * 64, in_use=False)
