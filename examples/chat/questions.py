"""Questions that the base itself asks: what stands where a user's message would begin is sampled (Magpie,
arXiv:2406.08464). They are far more varied than phrasings filled with subjects, and clumsy, as people's are."""

from collections.abc import Callable

from chat.prompts import Conversation, generic_prompts
from perseid_server.frontend.requests import ChatInput
from perseid_server.training.completions import Ask, answers_of
from perseid_server.training.workbench import Workbench

LONGEST = 64  # tokens
SHORTEST = 12  # characters
_MARK = "\x00"


def own_questions(
    bench: Workbench, count: int, seed: int, told: Callable[[int, int], None] = lambda _done, _count: None
) -> list[Conversation]:
    """What is left of `count` samples: different, ended questions that are not among those kept to judge by."""
    before = bench.text.render(ChatInput(({"role": "user", "content": _MARK},))).split(_MARK)[0]
    token_ids = tuple(bench.text.tokenizer.encode(before, add_special_tokens=False).ids)
    asks = [Ask(token_ids, LONGEST, temperature=1.0, seed=seed * 1_000_003 + number) for number in range(count)]
    found: dict[int, str] = {}
    for done, (index, answer) in enumerate(answers_of(bench, asks), 1):
        text = bench.text.decode(answer.token_ids).strip()
        if answer.token_ids[-1] in bench.spec.eos_token_ids and len(text) >= SHORTEST:
            found[index] = text
        told(done, count)
    kept = set(generic_prompts("generic_held_out"))
    different = dict.fromkeys(found[index] for index in sorted(found))
    return [Conversation((text,)) for text in different if text not in kept]
