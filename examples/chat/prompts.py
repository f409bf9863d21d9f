"""Phrasings, and prompts drawn from them with a fixed seed."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from chat import subjects as of

Draw = Callable[[random.Random], str]
"""Draws a prompt."""

_LENGTHS = ("", "", "", "", " Keep it short.", " Answer in one sentence.", " Use bullet points.", " Explain in detail.")
FOLLOW_UPS = (
    "Can you give me an example?",
    "Can you explain that in simpler words?",
    "Tell me more.",
    "Why is that?",
    "Summarize that in one sentence.",
    "What else should I know?",
    "Rewrite that as a list.",
    "Thank you! What would you do next?",
    "Are you sure?",
    "Make it shorter.",
    "Write it in a more formal tone.",
    "How does that compare to the usual way?",
)
PLURAL = ("What do {} eat?", "How long do {} live?", "Where do {} live?", "Tell me three facts about {}.")


@dataclass(frozen=True)
class Conversation:
    """User messages; the model answers each."""

    turns: tuple[str, ...]

    def line(self, adapter: str | None = None) -> str:
        """As `perseid train medusa` reads it: an answer of null is the model's own."""
        messages: list[dict[str, str | None]] = []
        for place, turn in enumerate(self.turns):
            if place:
                messages.append({"role": "assistant", "content": None})
            messages.append({"role": "user", "content": turn})
        return json.dumps({"messages": messages, "adapter": adapter}, ensure_ascii=False)


def _about(subjects: tuple[str, ...], *phrasings: str) -> Draw:
    return lambda rng: rng.choice(phrasings).format(rng.choice(subjects)) + rng.choice(_LENGTHS)


def _plain(subjects: tuple[str, ...], *phrasings: str) -> Draw:
    return lambda rng: rng.choice(phrasings).format(rng.choice(subjects))


def _program(rng: random.Random) -> str:
    phrasing = rng.choice(
        (
            "Write a {} function that {}.",
            "Show me {} code that {}.",
            "How would you write a {} program that {}?",
            "Write a small {} script that {} and explain it.",
        )
    )
    return phrasing.format(rng.choice(of.LANGUAGES), rng.choice(of.PROGRAMS))


def _arithmetic(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 40), rng.randint(2, 12)
    phrasings = (
        f"What is {a} plus {b}?",
        f"What is {a} minus {b}?",
        f"What is {a} times {c}?",
        f"Divide {a * c} by {c}.",
        f"What is {c * 5} percent of {a * 10}?",
        f"A shop sells pens for {c} dollars each. How much do {b} pens cost?",
        f"Tom has {a} apples and gives {c} to Ann. How many are left? Think step by step.",
        f"A car drives {a * 2} km in {c} hours. How fast is it?",
        f"Solve for x: {c}x + {b} = {c * b + b}",
        f"A rectangle is {a} cm long and {b} cm wide. What is its area?",
        f"I read {c} pages a day. How many days do I need for {c * b} pages?",
    )
    return rng.choice(phrasings)


def _translation(rng: random.Random) -> str:
    language = rng.choice(("French", "German", "Spanish", "Italian", "Portuguese"))
    phrasing = rng.choice(('Translate "{}" into {}.', 'How do you say "{}" in {}?', "Translate to {1}: {0}"))
    return phrasing.format(rng.choice(of.PHRASES), language)


KINDS: tuple[tuple[int, Draw], ...] = (
    (
        6,
        _about(
            of.CONCEPTS,
            "What is {}?",
            "Explain {} to a beginner.",
            "Explain {} in simple terms.",
            "How does {} work?",
            "Why is {} important?",
            "Give me an example of {}.",
            "Describe {} and its main parts.",
            "What are common misunderstandings about {}?",
        ),
    ),
    (
        4,
        _about(
            of.EVENTS_AND_PEOPLE,
            "Tell me about {}.",
            "Why is {} famous?",
            "What should everyone know about {}?",
            "Write a short paragraph about {}.",
            "When was {} and what came of it?",
            "What can we learn from {}?",
        ),
    ),
    (
        4,
        _about(
            of.PLACES,
            "What should I see in {}?",
            "Plan three days in {} for me.",
            "What is {} known for?",
            "What is the weather like in {} in spring?",
            "What do people eat in {}?",
            "I am going to {} next month. Any tips?",
            "Is {} expensive to visit?",
        ),
    ),
    (3, _about(of.ANIMALS_AND_PLANTS, "Tell me about {}.", "Write a poem about {}.", "Why are {} useful?", *PLURAL)),
    (
        3,
        _about(
            of.FOODS,
            "Give me a recipe for {}.",
            "How do I make {}?",
            "What goes well with {}?",
            "What ingredients do I need for {}?",
            "Is {} healthy?",
        ),
    ),
    (
        7,
        _about(
            of.ACTIVITIES,
            "How do I {}?",
            "How can I {}?",
            "Give me five tips to {}.",
            "I want to {}. Where do I start?",
            "What is the best way to {}?",
            "What do I need to {}?",
            "Make a checklist for someone who wants to {}.",
            "List the steps to {}.",
        ),
    ),
    (
        3,
        _about(
            of.TRAITS,
            "What is the difference between {}?",
            "Compare {}.",
            "What are the pros and cons of {}?",
            "How do I choose between {}?",
        ),
    ),
    (
        4,
        _plain(
            of.CHARACTERS,
            "Write a short story about {}.",
            "Tell me a bedtime story about {}.",
            "Begin a novel about {}.",
            "Write a dialogue with {}.",
            "Give me three titles for a book about {}.",
        ),
    ),
    (2, _plain(of.NOTIONS, "Write a poem about {}.", "Write a haiku about {}.", "Give me a quote about {}.")),
    (3, _plain(of.LETTERS, "Write an email to {}.", "Draft a short message to {}.", "Help me write to {}.")),
    (4, _program),
    (3, _arithmetic),
    (2, _translation),
    (
        2,
        _plain(
            of.ROLES,
            "Pretend you are {} and introduce yourself.",
            "You are {}. Greet a visitor.",
            "Imagine you are {}. What is your day like?",
            "Answer like {}: what makes life good?",
        ),
    ),
    (
        3,
        _plain(
            of.TEXTS,
            "Summarize: {}",
            "Summarize this text in one sentence: {}",
            "Give this text a title: {}",
            "What is the main point of this text? {}",
            "Shorten this text: {}",
            "Rewrite this for children: {}",
            "Write two questions about this text: {}",
            "Continue this text: {}",
        ),
    ),
    (
        2,
        _plain(
            of.SENTENCES,
            "Correct the grammar: {}",
            "Rewrite more politely: {}",
            "Make this sentence more formal: {}",
            "Say this in other words: {}",
            "Is this sentence positive or negative? {}",
        ),
    ),
    (
        2,
        _plain(
            of.WORDS,
            'What does "{}" mean?',
            'Use the word "{}" in a sentence.',
            "Give me synonyms of {}.",
            "Define {}.",
            "Where does the word {} come from?",
        ),
    ),
)


def generic_prompts(name: str) -> tuple[str, ...]:
    """Prompts that come with Perseid: `generic`, or `generic_held_out`, which is kept to judge by."""
    lines = (resources.files("perseid_router.training") / f"{name}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines)


def chat_prompts(count: int, seed: int, follow_up_share: float = 0.2) -> list[Conversation]:
    """`count` different conversations, none of which begins like a prompt that is kept to judge by."""
    rng = random.Random(seed)
    weights, draws = zip(*KINDS, strict=True)
    kept = set(generic_prompts("generic_held_out"))
    found: dict[str, Conversation] = {prompt: Conversation((prompt,)) for prompt in generic_prompts("generic")}
    while len(found) < count:
        prompt = rng.choices(draws, weights)[0](rng)
        follow_up = (rng.choice(FOLLOW_UPS),) if rng.random() < follow_up_share else ()
        if prompt not in kept:
            found.setdefault(prompt, Conversation((prompt, *follow_up)))
    conversations = list(found.values())[:count]
    rng.shuffle(conversations)
    return conversations
