"""Self-distillation: the served model, with or without an adapter, answers the prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perseid_server.errors import InvalidRequest
from perseid_server.frontend.requests import ChatInput
from perseid_server.training.completions import Ask, answers_of
from perseid_server.training.datasets import Told
from perseid_server.training.medusa.cache import AnswerCache, key_of
from perseid_server.training.medusa.config import MedusaTraining
from perseid_server.training.medusa.prompts import Message, Prompt
from perseid_server.training.workbench import Workbench

BASE = "base"


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer in the cache."""

    key: str
    prompt: int  # which prompt it belongs to: one with several open turns has several answers
    source: str  # the adapter's name, or BASE
    token_ids: tuple[int, ...]


def held_out_prompts(prompts: Sequence[Prompt], config: MedusaTraining) -> frozenset[int]:
    """Those to judge by: of every adapter, and of the base, the same share."""
    kept: set[int] = set()
    for adapter in {prompt.adapter for prompt in prompts}:
        order = [place for place, prompt in enumerate(prompts) if prompt.adapter == adapter]
        random.Random(f"{config.options.seed} {adapter}").shuffle(order)  # noqa: S311  not a secret
        kept.update(order[: round(len(order) * config.held_out_share)])
    return frozenset(kept)


def distill(
    bench: Workbench, prompts: Sequence[Prompt], held_out: frozenset[int], config: MedusaTraining, told: Told
) -> list[Answered]:
    """Every answer, in the order of the prompts; what the cache has is not asked again."""
    cache = AnswerCache.open(config.cache)
    distiller = _Distiller(bench, prompts, held_out, config, cache, told)
    found: list[Answered] = []
    open_turns = max(len(_open_turns(prompt)) for prompt in prompts)
    current = list(prompts)
    for turn in range(open_turns):
        asked = distiller.answer_turn(current, turn)
        found += asked
        for one in asked:
            current[one.prompt] = _filled(bench, current[one.prompt], one.token_ids)
    return sorted(found, key=lambda one: one.prompt)


def _open_turns(prompt: Prompt) -> list[int]:
    """Places where the model answers: behind the first `place` messages."""
    return [*(place for place, one in enumerate(prompt.messages) if one.content is None), len(prompt.messages)]


def _filled(bench: Workbench, prompt: Prompt, answer: Sequence[int]) -> Prompt:
    """With the first open turn answered."""
    place = _open_turns(prompt)[0]
    if place == len(prompt.messages):
        return prompt
    said = Message("assistant", bench.text.decode(answer).strip())
    return replace(prompt, messages=(*prompt.messages[:place], said, *prompt.messages[place + 1 :]))


@dataclass(frozen=True, slots=True)
class _Distiller:
    bench: Workbench
    prompts: Sequence[Prompt]
    held_out: frozenset[int]
    config: MedusaTraining
    cache: AnswerCache
    told: Told

    def answer_turn(self, prompts: Sequence[Prompt], turn: int) -> list[Answered]:
        """Of the prompts with more than `turn` open turns, the first one that is still open."""
        chosen = [place for place, prompt in enumerate(self.prompts) if len(_open_turns(prompt)) > turn]
        asks = [self._ask(prompts[place], place) for place in chosen]
        keys = [self._key(ask, self.prompts[place].adapter) for ask, place in zip(asks, chosen, strict=True)]
        missing = {key: ask for key, ask in zip(keys, asks, strict=True) if key not in self.cache}
        what = "answering prompts" if turn == 0 else f"answering turn {turn + 1}"
        self.told(what, len(asks) - len(missing), len(asks))
        names = list(missing)
        done = len(asks) - len(missing)
        for index, answer in answers_of(self.bench, list(missing.values())):
            self.cache.add(names[index], answer)
            done += 1
            self.told(what, done, len(asks))
        self.cache.flush()
        return [
            Answered(key, place, self.prompts[place].adapter or BASE, self.cache.tokens(key))
            for key, place in zip(keys, chosen, strict=True)
        ]

    def _ask(self, prompt: Prompt, place: int) -> Ask:
        messages = tuple(
            {"role": one.role, "content": one.content or ""} for one in prompt.messages[: _open_turns(prompt)[0]]
        )
        text = self.bench.text
        token_ids = tuple(text.tokenizer.encode(text.render(ChatInput(messages)), add_special_tokens=False).ids)
        config = self.config
        if len(token_ids) + config.answer_tokens > config.max_tokens:
            raise InvalidRequest(
                f"--prompts: prompt {place + 1} has {len(token_ids)} tokens; with answers of {config.answer_tokens} "
                f"at most {config.max_tokens - config.answer_tokens} fit; give a larger --max-tokens",
                field="prompts",
            )
        pages = {one.name: one.pages for one in self.bench.adapters}
        return Ask(
            token_ids,
            config.answer_tokens,
            None if prompt.adapter is None else pages[prompt.adapter],
            self._temperature(place),
            config.options.seed + place,
        )

    def _temperature(self, place: int) -> float:
        """Greedy for what is judged, and for all but a share of the rest."""
        rng = random.Random(f"{self.config.options.seed} sampled {place}")  # noqa: S311  not a secret
        sampled = place not in self.held_out and rng.random() < self.config.sampled_share
        return self.config.temperature if sampled else 0.0

    def _key(self, ask: Ask, adapter: str | None) -> str:
        versions = {one.name: one.version for one in self.bench.adapters}
        version = None if adapter is None else versions[adapter]
        return key_of(self.bench.spec.hash, version, ask.token_ids, ask.max_tokens, ask.temperature, ask.seed)
