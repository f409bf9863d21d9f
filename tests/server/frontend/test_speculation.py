"""How a request wants its drafts becomes what the engine is asked for; what cannot be had is refused or left out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from perseid_server.engine.adaptation import Adaptation
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation_options import AdaptationOptions, AutoOptions, BlendOf, Named
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from perseid_server.frontend.speculation import Drafting
from perseid_server.frontend.speculation_options import (
    ACCEPTANCES,
    MODES,
    SpeculationOptions,
    TypicalOptions,
    check_speculation,
)
from perseid_server.speculation.options import OFF, Mode, Speculation
from tests.server.stack import Stack, certain_router, make_stack

EDGES = (1e-9, 1.0)
BEYOND = (0.0, -0.1, 1.0000001, float("nan"), float("inf"))


@dataclass(frozen=True)
class FakeHeads:
    """Heads of a version."""

    version: str


@dataclass
class Loaded:
    """Heads of adapters by version, and the base's."""

    base: FakeHeads | None = None
    bound: dict[str, FakeHeads] = field(default_factory=dict)

    def heads_for(self, adaptation: Adaptation) -> FakeHeads | None:
        named = [heads for version, heads in self.bound.items() if adaptation == Adaptation.of(version)]
        return named[0] if named else self.base


async def submitted(
    stack: Stack,
    options: SpeculationOptions | None = None,
    adaptation: AdaptationOptions | None = None,
    **sampling: Any,
) -> Speculation:
    """What the engine is asked for."""
    asked = GenerationRequest(
        "r", TextInput("say"), adaptation, SamplingOptions(**{"max_tokens": 2} | sampling),
        speculation=options or SpeculationOptions(),
    )  # fmt: skip
    before = len(stack.engine.submitted)
    async with stack.service.generate(asked) as generation:
        async for _ in generation:
            pass
    [speculation] = {submit.speculation for submit in stack.engine.submitted[before:]}
    assert generation.speculation == speculation
    return speculation


@pytest.mark.parametrize("default", list(MODES))
async def test_without_a_word_the_servers_default_holds(tmp_path: Path, default: Mode) -> None:
    stack = make_stack(tmp_path, drafting=Drafting(Loaded(FakeHeads("h")), default))
    heads = "h" if default in {"auto", "medusa"} else None
    assert await submitted(stack) == Speculation(default, heads)


async def test_a_request_wins_over_the_default(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, drafting=Drafting(Loaded(FakeHeads("h")), "off"))
    assert await submitted(stack, SpeculationOptions("medusa")) == Speculation("medusa", "h")
    assert await submitted(stack, SpeculationOptions("ngram")) == Speculation("ngram")
    assert await submitted(stack, SpeculationOptions("off")) == OFF


async def test_without_heads_auto_and_the_servers_default_draft_what_they_can(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, drafting=Drafting(default="medusa"))
    assert await submitted(stack, SpeculationOptions("auto")) == Speculation("auto")
    assert await submitted(stack) == Speculation("medusa"), "the client did not ask for heads"


async def test_heads_that_are_not_there_are_refused_with_what_to_do(stack: Stack) -> None:
    await stack.load("one")
    with pytest.raises(InvalidRequest, match=r"^speculation: no Medusa heads .* for the base\); load .* adapters load"):
        await submitted(stack, SpeculationOptions("medusa"))
    with pytest.raises(InvalidRequest, match="none are loaded for adapter 'one', and none for the base") as refused:
        await submitted(stack, SpeculationOptions("medusa"), Named("one"))
    assert refused.value.field == "speculation"
    assert not stack.registry.leases.versions(), "what is refused holds nothing"


async def test_each_adaptation_drafts_with_its_heads(tmp_path: Path) -> None:
    loaded = Loaded(FakeHeads("base's"))
    stack = make_stack(tmp_path, drafting=Drafting(loaded))
    stack.says("abc")
    one, _ = await stack.load("one", seed=1), await stack.load("two", seed=2)
    await stack.load_gates("g", "one", "two", router=certain_router("one", "two"))
    loaded.bound[one] = FakeHeads("one's")
    drafts = {
        "base": await submitted(stack),
        "one": await submitted(stack, None, Named("one")),
        "two": await submitted(stack, None, Named("two")),
        "blend": await submitted(stack, None, BlendOf((("one", 0.5), ("two", 0.5)))),
        "plain blend": await submitted(stack, None, BlendOf((("one", 1.0),))),
        "gates": await submitted(stack, None, AutoOptions()),
    }
    assert {name: each.heads for name, each in drafts.items()} == dict.fromkeys(drafts, "base's") | {
        "one": "one's", "plain blend": "one's"
    }  # fmt: skip


@pytest.mark.parametrize("sampling", [{"n": 3}, {"logprobs": 2}, {"logprobs": 0, "echo": True}, {"stop": ("zz",)}])
async def test_drafts_go_with_all_else_a_request_asks_for(stack: Stack, sampling: dict[str, Any]) -> None:
    wanted = SpeculationOptions("ngram", "typical", TypicalOptions(0.2, 0.5))
    assert await submitted(stack, wanted, **sampling) == Speculation("ngram", None, "typical", 0.2, 0.5)


async def test_typical_acceptance_has_the_papers_defaults(stack: Stack) -> None:
    told = await submitted(stack, SpeculationOptions(acceptance="typical"))
    assert (told.epsilon, told.delta) == (0.09, 0.3)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_every_mode_goes_with_every_acceptance(mode: str | None, acceptance: str) -> None:
    check_speculation(SpeculationOptions(mode, acceptance))


@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_typical_options_have_edges(name: str) -> None:
    for value in EDGES:
        check_speculation(SpeculationOptions(acceptance="typical", typical=TypicalOptions(**{name: value})))
    for value in BEYOND:
        with pytest.raises(InvalidRequest, match=rf"^typical\.{name} is .*; expected a number in \(0, 1\]") as refused:
            check_speculation(SpeculationOptions(acceptance="typical", typical=TypicalOptions(**{name: value})))
        assert refused.value.field == f"typical.{name}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SpeculationOptions("fast"),
            "speculation is 'fast'; expected one of \"auto\", \"medusa\", \"ngram\", \"off\"",
        ),
        (SpeculationOptions(""), "speculation is ''; expected one of \"auto\", \"medusa\", \"ngram\", \"off\""),
        (SpeculationOptions(acceptance="greedy"), "acceptance is 'greedy'; expected one of \"exact\", \"typical\""),
        (SpeculationOptions(typical=TypicalOptions()), 'typical: allowed only with acceptance "typical"'),
    ],
)  # fmt: skip
def test_other_words_are_refused_with_those_that_are_known(options: SpeculationOptions, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_speculation(options)
    assert refused.value.message == message
    assert refused.value.field == message.split(maxsplit=1)[0].rstrip(":")
