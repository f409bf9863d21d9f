"""Prompts of the proofs as token ids: ordinary text of many lengths, so that rows and chunks are uneven."""

from pathlib import Path

from perseid_server.model.source import resolve_model
from perseid_server.model.tokenizer import export_tokenizer

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old man who",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "List three reasons why regular exercise is good for your health:\n1.",
    "Dear Sir or Madam,\n\nI am writing to you because the bicycle that I bought in your shop last week",
    "In mathematics, a prime number is",
    "The quick brown fox",
    "Question: How many legs does a spider have?\nAnswer:",
    "To make a simple tomato sauce, first heat some olive oil in a pan, then add garlic and onions. After that",
    "SELECT name, age FROM people WHERE",
    "Die Hauptstadt von Deutschland ist",
    (
        "The history of the Roman Empire can be divided into several periods. The first of them began when Augustus "
        "became emperor, and it was marked by peace and prosperity. During this time, roads and aqueducts were built "
        "all over the empire, trade flourished, and the arts were encouraged. Later emperors were less successful, and"
    ),
    "Hello!",
    "A: What did you do at the weekend?\nB: I went to the mountains with my sister. We",
    "🙂 means happy, 😢 means sad, and",
)


def prompt_ids(base_gguf: Path) -> list[tuple[int, ...]]:
    """Every text as the embedded base's token ids."""
    bundle = export_tokenizer(resolve_model(str(base_gguf)))
    return [tuple(bundle.tokenizer.encode(text).ids) for text in TEXTS]
