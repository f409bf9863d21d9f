"""Text ↔ tokens and the chat template of a base, without torch or transformers: the API process lives on this."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from perseid_server.errors import UnsupportedModel, quoted
from perseid_server.model.config_fields import token_ids
from perseid_server.model.gguf_config import end_token_ids
from perseid_server.model.gguf_tokenizer import token_text, tokenizer_from_gguf
from perseid_server.model.headers.gguf import GgufHeader, read_gguf_header
from perseid_server.model.headers.safetensors import read_json
from perseid_server.model.source import ModelSource
from perseid_server.model.tokenizer_errors import library_errors

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_GGUF_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclass(frozen=True, slots=True)
class TokenizerBundle:
    """`tokenizer.encode(text)` adds what the model expects before a plain text (a BOS token, or nothing);
    `encode(text, add_special_tokens=False)` does not, as rendered chat templates need."""

    tokenizer: Tokenizer
    chat_template: str | None  # Jinja
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" → text, for the template
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # all that end a generation, the end of text among them
    add_bos: bool = False  # whether `encode` puts BOS first

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a document."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends one."""
        return self.special_tokens.get("eos_token")


def export_tokenizer(source: ModelSource) -> TokenizerBundle:
    """Read the tokenizer of a base. UnsupportedModel names what is missing or not known."""
    if source.kind == "gguf":
        return bundle_from_gguf(read_gguf_header(source.path))
    return bundle_from_folder(source.path)


def bundle_from_gguf(header: GgufHeader) -> TokenizerBundle:
    """The tokenizer inside a GGUF file."""
    texts = {name: token_text(header, key) for name, key in _GGUF_KEYS.items()}
    return _bundle(
        tokenizer_from_gguf(header),
        _template_of(header),
        {name: text for name, text in texts.items() if text is not None},
        end_token_ids(header),
    )


def _template_of(header: GgufHeader) -> str | None:
    stated = header.metadata.get("tokenizer.chat_template")
    return None if stated is None else _text("tokenizer.chat_template", stated)


def bundle_from_folder(folder: Path) -> TokenizerBundle:
    """`tokenizer.json` and what lies beside it in a Hugging Face folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            field="tokenizer.json",
        )
    with library_errors("tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _optional_json(folder / "tokenizer_config.json")
    texts = _token_texts(_optional_json(folder / "special_tokens_map.json") | settings)
    stated = _optional_json(folder / "generation_config.json"), _optional_json(folder / "config.json")
    ends = tuple(dict.fromkeys(end for one in stated for end in token_ids(one, "eos_token_id")))
    return _bundle(tokenizer, _chat_template(folder, settings), texts, ends)


def _bundle(
    tokenizer: Tokenizer, chat_template: str | None, texts: dict[str, str], ends: tuple[int, ...]
) -> TokenizerBundle:
    def identity(name: str) -> int | None:
        return tokenizer.token_to_id(texts[name]) if name in texts else None

    bos, eos = identity("bos_token"), identity("eos_token")
    if eos is not None and eos not in ends:
        ends = (*ends, eos)
    return TokenizerBundle(
        tokenizer=tokenizer,
        chat_template=chat_template,
        special_tokens=texts,
        bos_token_id=bos,
        eos_token_id=eos,
        stop_token_ids=ends,
        add_bos=bos is not None and tokenizer.encode("").ids[:1] == [bos],
    )


def _token_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens are stated as text, or as an object whose `content` is the text."""
    stated = {name: settings.get(name) for name in _NAMED_TOKENS}
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in stated.items()}
    return {name: _text(name, text) for name, text in found.items() if text is not None}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From `chat_template.jinja`, else `chat_template.json`, else the tokenizer's config; of several, "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    stated = _optional_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(stated, list):
        named = (entry for entry in stated if isinstance(entry, dict) and entry.get("name") == "default")
        stated = next((entry.get("template") for entry in named), None)
    return None if stated is None else _text("chat_template", stated)


def _text(name: str, value: Any) -> str:
    """A text that can be written down: JSON can hold half a character."""
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise UnsupportedModel(f"{name}: expected a text, got {quoted(value)}", field=name)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
