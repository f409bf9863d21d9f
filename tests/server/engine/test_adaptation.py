"""What adapts a request, and the key of the K and V it leads to."""

from perseid_server.engine.adaptation import BASE, BASE_COLUMN, Adaptation, Routing

ROUTING = Routing("g", ("a", None, "b", BASE_COLUMN), 2, 1.0)


def test_what_has_to_be_on_the_device():
    assert BASE.versions == ()
    assert Adaptation.of(None) is BASE
    assert Adaptation.of("a").versions == ("a",)
    assert Adaptation((("a", 0.5), ("b", 0.5))).versions == ("a", "b")
    routed = Adaptation(routing=ROUTING)
    assert routed.adapters == ("a", "b")
    assert routed.versions == ("g", "a", "b")


def test_whatever_changes_k_and_v_changes_the_key():
    different = [
        BASE,
        Adaptation.of("a"),
        Adaptation((("a", 0.5),)),
        Adaptation((("a", -1.0),)),
        Adaptation((("a", 1.0), ("b", 1.0))),
        Adaptation((("b", 1.0), ("a", 1.0))),  # another order of additions
        Adaptation(routing=ROUTING),
        Adaptation(routing=Routing("other", ROUTING.columns, 2, 1.0)),
        Adaptation(routing=Routing("g", ROUTING.columns, 1, 1.0)),
        Adaptation(routing=Routing("g", ROUTING.columns, 2, 1.5)),
        Adaptation(routing=Routing("g", ("a", "c", "b", BASE_COLUMN), 2, 1.0)),
        Adaptation(routing=Routing("g", ("a", None, "b", None), 2, 1.0)),
    ]
    assert len({each.key for each in different}) == len(different)


def test_the_same_adapter_by_whatever_way_has_one_key():
    assert Adaptation((("a", 1.0),)).key == Adaptation.of("a").key
