"""What a request wants becomes what the engine is asked for: versions, in the one order, leased until it ends."""

import pytest

from perseid_server.engine.adaptation import BASE, BASE_COLUMN, Adaptation, Routing
from perseid_server.errors import InvalidRequest, NotFound, PerseidError
from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.adaptation_options import AdaptationOptions, AutoOptions, BlendOf, Named
from tests.server.stack import Stack, certain_router, make_stack, write_adapter

NOTHING_KNOWN = tuple(b"xyz")


def resolve(stack: Stack, options: AdaptationOptions | None, prompt: tuple[int, ...] = NOTHING_KNOWN) -> Resolved:
    with stack.service._resolver.leased(options) as decide:
        return decide(prompt)


def refusal(stack: Stack, options: AdaptationOptions, prompt: tuple[int, ...] = NOTHING_KNOWN) -> PerseidError:
    with pytest.raises(PerseidError) as refused:
        resolve(stack, options, prompt)
    assert not stack.registry.leases.versions()
    return refused.value


async def load(stack: Stack, *names: str) -> dict[str, str]:
    """Adapters of these names; their versions."""
    return {name: await stack.load(name, seed=seed) for seed, name in enumerate(names)}


async def load_rank(stack: Stack, name: str, rank: int, **options) -> None:
    folder = write_adapter(stack.root / name, seed=rank, rank=rank)
    await stack.registry.load(name, str(folder), **options)


def routing_of(resolved: Resolved) -> Routing:
    assert resolved.adaptation.routing is not None
    return resolved.adaptation.routing


# --- names and blends -----------------------------------------------------------------------------------------------


async def test_nothing_is_the_base_and_a_name_is_its_version(stack: Stack) -> None:
    versions = await load(stack, "a")
    assert resolve(stack, None) == Resolved()
    named = resolve(stack, Named("a"))
    assert named.adaptation == Adaptation.of(versions["a"])
    assert named.adapter == stack.registry.get("a")


async def test_a_blend_is_sorted_by_version_whatever_its_order(stack: Stack) -> None:
    versions = await load(stack, "a", "b", "c")
    wanted = [("a", 0.5), ("b", -2.0), ("c", 16.0)]
    resolved = [resolve(stack, BlendOf(tuple(order))) for order in (wanted, wanted[::-1])]
    assert resolved[0].adaptation == resolved[1].adaptation
    assert resolved[0].adaptation.weights == tuple(sorted((versions[name], weight) for name, weight in wanted))
    assert [(adapter.name, weight) for adapter, weight in resolved[0].blend] == wanted
    assert resolved[0].adapter is None


@pytest.mark.parametrize("others", [[], [("b", 0.0)], [("same", 0.0)]])
async def test_one_adapter_of_weight_one_is_that_adapter(stack: Stack, others: list[tuple[str, float]]) -> None:
    versions = await load(stack, "a", "b")
    await stack.registry.load("same", str(stack.root / "a-0"))
    resolved = resolve(stack, BlendOf((("a", 1.0), *others)))
    assert resolved.adaptation == Adaptation.of(versions["a"])
    assert resolved.adapter == stack.registry.get("a")


async def test_equal_versions_under_two_names_add_up(stack: Stack) -> None:
    versions = await load(stack, "a")
    await stack.registry.load("same", str(stack.root / "a-0"))
    assert resolve(stack, BlendOf((("a", 0.25), ("same", 0.5)))).adaptation.weights == ((versions["a"], 0.75),)
    assert resolve(stack, BlendOf((("a", 0.25), ("same", 0.75)))).adaptation == Adaptation.of(versions["a"])
    assert resolve(stack, BlendOf((("a", 0.25), ("same", -0.25)))).adaptation == BASE


async def test_all_of_weight_zero_is_the_base(stack: Stack) -> None:
    await load(stack, "a", "b")
    assert resolve(stack, BlendOf((("a", 0.0), ("b", -0.0)))).adaptation == BASE


async def test_an_unknown_adapter_of_a_blend_is_named_with_its_place(stack: Stack) -> None:
    await load(stack, "a")
    error = refusal(stack, BlendOf((("a", 1.0), ("nobody", 1.0))))
    assert isinstance(error, NotFound)
    assert error.field == "adapters.1.name"
    assert error.message == "adapters.1.name: no adapter 'nobody' is loaded"


async def test_a_gate_set_is_no_adapter(stack: Stack) -> None:
    await load(stack, "a")
    await stack.load_gates("g", "a")
    assert "'g' is a gate set, not an adapter" in refusal(stack, Named("g")).message
    assert refusal(stack, BlendOf((("a", 1.0), ("g", 1.0)))).field == "adapters.1.name"


async def test_every_part_of_a_blend_is_leased(stack: Stack) -> None:
    versions = await load(stack, "a", "b")
    with stack.service._resolver.leased(BlendOf((("a", 1.0), ("b", 0.0)))):
        assert stack.registry.leases.versions() == set(versions.values())
    assert stack.registry.leases.versions() == set()


async def test_a_blend_that_cannot_be_on_the_device_at_once_is_refused(tmp_path) -> None:
    stack = make_stack(tmp_path, num_pages=3)
    for name, rank in (("one", 16), ("two", 32), ("three", 48)):
        await load_rank(stack, name, rank)
    assert resolve(stack, BlendOf((("one", 1.0), ("two", 1.0)))).blend
    assert resolve(stack, BlendOf((("three", 0.5), ("one", 0.0)))).blend, "weight 0 takes no room"
    error = refusal(stack, BlendOf((("two", 1.0), ("three", 1.0))))
    assert error.field == "adapters"
    assert "take 5 pages of adapter memory together, and the server has room for 3; " in error.message
    assert "--adapter-memory" in error.message


async def test_pinned_adapters_take_room_from_others(tmp_path) -> None:
    stack = make_stack(tmp_path, num_pages=4)
    for name, rank in (("one", 16), ("two", 32), ("pinned", 31)):
        await load_rank(stack, name, rank, pin=name == "pinned")
    assert "room for 2 beside 2 of pinned" in refusal(stack, BlendOf((("one", 1.0), ("two", 1.0)))).message
    assert resolve(stack, BlendOf((("pinned", 1.0), ("two", 1.0)))).blend


# --- auto -----------------------------------------------------------------------------------------------------------


async def test_auto_asks_for_the_gate_sets_columns_in_its_order(stack: Stack) -> None:
    versions = await load(stack, "a", "b", "c")
    gates = await stack.load_gates("g", "c", "a", k=1, temperature=0.5)
    resolved = resolve(stack, AutoOptions())
    assert routing_of(resolved) == Routing(gates, (versions["c"], versions["a"], BASE_COLUMN), 1, 0.5)
    assert resolved.adapter is None
    assert (resolved.auto.gate_set.name, resolved.auto.tier, resolved.auto.columns) == ("g", "token", ("c", "a", ""))


async def test_options_take_the_place_of_the_gate_sets(stack: Stack) -> None:
    versions = await load(stack, "a", "b")
    await stack.load_gates("g", "a", "b")
    routing = routing_of(resolve(stack, AutoOptions(allow=("b",), k=3, temperature=100.0, null=False)))
    assert (routing.columns, routing.k, routing.temperature) == ((None, versions["b"], None), 3, 100.0)


async def test_a_gate_set_without_the_base_has_no_column_for_it(stack: Stack) -> None:
    versions = await load(stack, "a")
    await stack.load_gates("g", "a", null=False)
    assert routing_of(resolve(stack, AutoOptions())).columns == (versions["a"],)


async def test_k_beyond_the_columns_is_refused(stack: Stack) -> None:
    await load(stack, "a", "b")
    await stack.load_gates("g", "a")
    error = refusal(stack, AutoOptions(k=3))
    assert (error.field, error.message) == ("auto.k", "auto.k is 3; gate set 'g' has 2 columns")
    assert routing_of(resolve(stack, AutoOptions(k=3, join=True))).k == 3


async def test_unloaded_and_replaced_adapters_cannot_be_chosen(stack: Stack) -> None:
    versions = await load(stack, "a", "b", "c")
    await stack.load_gates("g", "a", "b", "c")
    await stack.registry.unload("a")
    await stack.load("b", seed=9, replace=True)
    assert routing_of(resolve(stack, AutoOptions())).columns == (None, None, versions["c"], BASE_COLUMN)
    await stack.load("b", seed=1, replace=True)
    assert routing_of(resolve(stack, AutoOptions())).columns == (None, versions["b"], versions["c"], BASE_COLUMN)


async def test_an_adapter_is_found_by_version_under_another_name(stack: Stack) -> None:
    versions = await load(stack, "a")
    await stack.load_gates("g", "a")
    await stack.registry.load("other", str(stack.root / "a-0"))
    assert routing_of(resolve(stack, AutoOptions(allow=("other",)))).columns == (versions["a"], BASE_COLUMN)
    await stack.registry.unload("a")
    resolved = resolve(stack, AutoOptions())
    assert routing_of(resolved).columns == (versions["a"], BASE_COLUMN)
    assert resolved.auto.columns == ("other", "")


async def test_where_nothing_is_left_each_adapters_reason_is_told(stack: Stack) -> None:
    await load(stack, "a", "b", "c", "new")
    await stack.load_gates("g", "a", "b", "c")
    await stack.registry.unload("a")
    await stack.load("b", seed=9, replace=True)
    error = refusal(stack, AutoOptions(allow=("a", "b", "new")))
    assert error.field == "auto.allow"
    assert error.message == (
        "auto.allow: no adapter of gate set 'g' can be chosen: 'a' is not loaded, 'b' has been replaced by another "
        "version than the gates were made for, 'new' is not in the gate set (auto.join lets it take part)"
    )
    await stack.registry.unload("c")
    assert "'c' is not loaded" in refusal(stack, AutoOptions()).message


async def test_a_name_nobody_knows_is_refused_though_others_are_left(stack: Stack) -> None:
    await load(stack, "a")
    await stack.load_gates("g", "a")
    for name in ("nobody", "g", ""):
        error = refusal(stack, AutoOptions(allow=("a", name)))
        assert isinstance(error, InvalidRequest)
        assert (error.field, repr(name) in error.message) == ("auto.allow.1", True)


async def test_the_gate_set_has_to_be_clear(tmp_path) -> None:
    stack = make_stack(tmp_path)
    await load(stack, "a")
    assert "no gate set is loaded" in refusal(stack, AutoOptions()).message
    first = await stack.load_gates("g", "a")
    assert routing_of(resolve(stack, AutoOptions())).gate_set == first
    second = await stack.load_gates("h", "a", seed=1)
    error = refusal(stack, AutoOptions())
    assert (type(error), error.field) == (InvalidRequest, "auto.gate_set")
    assert "2 gate sets are loaded ('g', 'h')" in error.message
    assert routing_of(resolve(stack, AutoOptions("h"))).gate_set == second
    assert isinstance(refusal(stack, AutoOptions("nobody")), NotFound)
    assert "'a' is an adapter, not a gate set" in refusal(stack, AutoOptions("a")).message
    assert stack.service.gate_sets.meant_by_auto() is None


async def test_the_operators_default_is_what_auto_means(tmp_path) -> None:
    stack = make_stack(tmp_path, default_gate_set="h")
    await load(stack, "a")
    await stack.load_gates("g", "a")
    assert "no gate set 'h' is loaded" in refusal(stack, AutoOptions()).message, "another is not guessed"
    version = await stack.load_gates("h", "a", seed=1)
    assert routing_of(resolve(stack, AutoOptions())).gate_set == version
    assert stack.service.gate_sets.meant_by_auto() == stack.registry.get("h")


async def test_all_that_auto_may_use_is_leased(stack: Stack) -> None:
    versions = await load(stack, "a", "b", "c")
    gates = await stack.load_gates("g", "a", "b")
    with stack.service._resolver.leased(AutoOptions(allow=("a",))):
        assert stack.registry.leases.versions() == {gates, versions["a"]}
    assert stack.registry.leases.versions() == set()


async def test_more_adapters_than_the_device_holds_at_once_are_refused(tmp_path) -> None:
    stack = make_stack(tmp_path, num_pages=3)
    for name, rank in (("one", 16), ("two", 32), ("three", 48)):
        await load_rank(stack, name, rank)
    await stack.load_gates("g", "one", "two", "three", router=certain_router("one", "two", "three"))
    error = refusal(stack, AutoOptions())
    assert error.field == "auto"
    assert "take 6 pages" in error.message
    assert "auto.allow" in error.message
    assert "--adapter-memory" in error.message
    assert resolve(stack, AutoOptions(allow=("one", "two"))).auto.tier == "token"
    assert resolve(stack, AutoOptions(), tuple(b"cccc")).auto.tier == "request", "one alone has room"


# --- the request-level router ---------------------------------------------------------------------------------------


async def with_router(stack: Stack) -> dict[str, str]:
    versions = await load(stack, "a", "b", "new")
    await stack.load_gates("g", "a", "b", router=certain_router("a", "b"))
    return versions


async def test_a_sure_router_makes_it_the_explicit_request(stack: Stack) -> None:
    versions = await with_router(stack)
    resolved = resolve(stack, AutoOptions(), tuple(b"bbbb"))
    assert resolved.adaptation == Adaptation.of(versions["b"])
    assert (resolved.adapter.name, resolved.auto.tier) == ("b", "request")


async def test_a_router_sure_of_the_base_makes_it_the_bases_request(stack: Stack) -> None:
    await with_router(stack)
    resolved = resolve(stack, AutoOptions(), tuple(b"cccc"))
    assert (resolved.adaptation, resolved.adapter, resolved.auto.tier) == (BASE, None, "request")
    assert resolve(stack, AutoOptions(null=False), tuple(b"cccc")).auto.tier == "token"


@pytest.mark.parametrize("prompt", [NOTHING_KNOWN, tuple(b"aabb")])
async def test_an_unsure_router_leaves_it_to_the_gates(stack: Stack, prompt: tuple[int, ...]) -> None:
    await with_router(stack)
    assert resolve(stack, AutoOptions(), prompt).auto.tier == "token"


async def test_a_router_sure_of_what_is_not_allowed_leaves_it_to_the_gates(stack: Stack) -> None:
    await with_router(stack)
    assert resolve(stack, AutoOptions(allow=("a",)), tuple(b"bbbb")).auto.tier == "token"


async def test_each_tier_can_be_forced(stack: Stack) -> None:
    versions = await with_router(stack)
    assert resolve(stack, AutoOptions(tier="token"), tuple(b"bbbb")).auto.tier == "token"
    guess = resolve(stack, AutoOptions(tier="request"), tuple(b"aaabb"))
    assert guess.adaptation == Adaptation.of(versions["a"]), "the best guess where it is not sure"
    only = resolve(stack, AutoOptions(tier="request", allow=("b",), null=False), tuple(b"aaaa"))
    assert only.adaptation == Adaptation.of(versions["b"])
    assert resolve(stack, AutoOptions(tier="request"), tuple(b"ccca")).adaptation == BASE


async def test_the_request_tier_needs_a_router_that_knows_an_allowed_adapter(stack: Stack) -> None:
    await load(stack, "a", "new")
    await stack.load_gates("g", "a")
    error = refusal(stack, AutoOptions(tier="request"))
    assert (error.field, "has no request-level router" in error.message) == ("auto.tier", True)
    await stack.load_gates("g", "a", router=certain_router("a"), replace=True)
    error = refusal(stack, AutoOptions(tier="request", allow=("new",), join=True))
    assert "knows none of the allowed adapters" in error.message


# --- joining --------------------------------------------------------------------------------------------------------


async def test_others_join_behind_the_gate_sets_own_in_the_order_they_were_loaded(stack: Stack) -> None:
    versions = await load(stack, "n1", "a", "n2")
    gates = await stack.load_gates("g", "a")
    with stack.service._resolver.leased(AutoOptions(join=True)) as decide:
        resolved = decide(NOTHING_KNOWN)
        routing = routing_of(resolved)
        columns = (versions["a"], versions["n1"], versions["n2"])
        assert routing.columns == (*columns, BASE_COLUMN)
        assert resolved.auto.joined == ("n1", "n2")
        told = stack.engine.gate_sets[routing.gate_set]
        assert (told.adapters, told.null) == (columns, True)
        assert told.path == stack.engine.gate_sets[gates].path
        assert stack.registry.leases.versions() == {gates, *versions.values()}


async def test_what_joins_but_is_not_allowed_is_masked_in_the_same_set(stack: Stack) -> None:
    versions = await load(stack, "a", "n1", "n2")
    await stack.load_gates("g", "a")
    everyone = routing_of(resolve(stack, AutoOptions(join=True)))
    some = resolve(stack, AutoOptions(join=True, allow=("n2",)))
    assert routing_of(some).gate_set == everyone.gate_set
    assert routing_of(some).columns == (None, None, versions["n2"], BASE_COLUMN)
    assert some.auto.joined == ("n2",)


async def test_more_columns_than_a_gate_set_may_have_are_refused(stack: Stack, monkeypatch) -> None:
    await load(stack, "a", "n1", "n2")
    await stack.load_gates("g", "a")
    monkeypatch.setattr("perseid_server.frontend.adaptation.MAX_COLUMNS", 4)
    assert len(routing_of(resolve(stack, AutoOptions(join=True))).columns) == 4
    monkeypatch.setattr("perseid_server.frontend.adaptation.MAX_COLUMNS", 3)
    error = refusal(stack, AutoOptions(join=True))
    assert (error.field, "2 adapters would join" in error.message) == ("auto.join", True)


@pytest.mark.parametrize("options", [AutoOptions(join=True, allow=("a",)), AutoOptions(join=False)])
async def test_where_none_joins_it_is_the_gate_set_itself(stack: Stack, options: AutoOptions) -> None:
    await load(stack, "a", "new")
    gates = await stack.load_gates("g", "a")
    assert routing_of(resolve(stack, options)).gate_set == gates


async def test_a_sure_router_is_not_asked_where_others_join(stack: Stack) -> None:
    await with_router(stack)
    assert resolve(stack, AutoOptions(join=True), tuple(b"aaaa")).auto.tier == "token"
    assert resolve(stack, AutoOptions(join=True, tier="request"), tuple(b"aaaa")).auto.tier == "request"


async def test_a_joined_set_is_kept_until_names_change_and_its_last_user_has_ended(stack: Stack) -> None:
    await load(stack, "a", "new")
    gates = await stack.load_gates("g", "a")
    joined = routing_of(resolve(stack, AutoOptions(join=True))).gate_set
    assert set(stack.engine.gate_sets) == {gates, joined}, "the next request finds it ready"
    with stack.service._resolver.leased(AutoOptions(join=True)) as decide:
        assert routing_of(decide(NOTHING_KNOWN)).gate_set == joined
        await stack.load("later", seed=7)
        assert set(stack.engine.gate_sets) == {gates, joined}, "a request uses it"
        newer = routing_of(resolve(stack, AutoOptions(join=True))).gate_set
        assert newer != joined
    assert set(stack.engine.gate_sets) == {gates, newer}
    await stack.registry.unload("g")
    assert stack.engine.gate_sets == {}
