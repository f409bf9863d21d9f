"""A `tokenizers.Tokenizer` from the vocabulary in a GGUF file. Imports no torch.

GGUF stores tokens, merges or scores, token types, and the name of a pre-tokenizer; how text is split before merging is
known by that name alone. Facts: llama.cpp's llama-vocab.cpp, and the tokenizer.json of the models the names stand for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from perseid_server.errors import UnsupportedModel, quoted
from perseid_server.model.config_fields import integer, names, token_ids, wrong
from perseid_server.model.headers.gguf import GgufHeader
from perseid_server.model.tokenizer_errors import library_errors


class TokenType(IntEnum):
    """llama.cpp's token types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a family of byte-level vocabularies cuts text before merging."""

    pattern: str | None = None  # None: GPT-2's own
    single_digits: bool = False  # each digit is a piece of its own
    nfc: bool = False  # text is normalised first
    whole_words: bool = False  # a piece that is in the vocabulary is not built from merges
    add_bos: bool = False  # where the file does not say


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3_SPLITTING = Splitting(_LLAMA3, whole_words=True, add_bos=True)

SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting(),
    "default": Splitting(),
    "smollm": Splitting(single_digits=True),
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "qwen2": Splitting(_QWEN2, nfc=True),
    "deepseek-r1-qwen": Splitting(_QWEN2, nfc=True),
    "tekken": Splitting(_TEKKEN, whole_words=True, add_bos=True),
}
"""By the file's `tokenizer.ggml.pre`."""


def tokenizer_from_gguf(header: GgufHeader) -> Tokenizer:
    """The tokenizer a GGUF describes. UnsupportedModel names a vocabulary or pre-tokenizer that is not known."""
    match header.metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            tokenizer = _byte_level(header, _splitting(header))
        case "llama":
            tokenizer = _sentence_piece(header)
        case kind:
            raise UnsupportedModel(
                f"tokenizer.ggml.model: {kind!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' "
                "(SentencePiece BPE)",
                field="tokenizer.ggml.model",
            )
    _add_marked_tokens(tokenizer, header)
    bos = _bos_to_add(header)
    if bos is not None:
        with library_errors("tokenizer.ggml.bos_token_id"):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
    return tokenizer


def token_text(header: GgufHeader, key: str) -> str | None:
    """The text of a token the metadata names by id, `bos_token_id` for example."""
    name = f"tokenizer.ggml.{key}"
    if header.metadata.get(name) is None:
        return None
    index, tokens = integer(header.metadata, name, 0), _tokens(header)
    if not 0 <= index < len(tokens):
        raise wrong(header.metadata, name, f"a token of the {len(tokens)} in the file")
    return tokens[index]


def _bos_to_add(header: GgufHeader) -> str | None:
    """The token put before every text, if any."""
    is_sentence_piece = header.metadata.get("tokenizer.ggml.model") == "llama"
    default = True if is_sentence_piece else _splitting(header).add_bos
    wanted = header.metadata.get("tokenizer.ggml.add_bos_token", default)
    return token_text(header, "bos_token_id") if wanted else None


def _splitting(header: GgufHeader) -> Splitting:
    name = str(header.metadata.get("tokenizer.ggml.pre"))
    if name not in SPLITTINGS:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre: {name!r} is not supported; supported: {', '.join(SPLITTINGS)}",
            field="tokenizer.ggml.pre",
        )
    return SPLITTINGS[name]


def _byte_level(header: GgufHeader, splitting: Splitting) -> Tokenizer:
    key = "tokenizer.ggml.merges"
    if header.metadata.get(key) is None:
        raise wrong(header.metadata, key, "the merges of a byte-level vocabulary")
    merges = [_pair(merge) for merge in names(header.metadata, key)]
    with library_errors(key):
        tokenizer = Tokenizer(models.BPE(_vocabulary(header), merges, ignore_merges=splitting.whole_words))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(header: GgufHeader) -> Tokenizer:
    """SentencePiece BPE: spaces become ▁, unknown characters fall back to bytes, the best-scored pair merges first."""
    vocabulary = _vocabulary(header)
    prefix_space = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    merges = _merges_from_scores(vocabulary, _scores(header))
    unknown = token_text(header, "unknown_token_id")
    with library_errors("tokenizer.ggml.tokens"):
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    scheme = "first" if prefix_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator or " " in right:
        raise UnsupportedModel(
            f"tokenizer.ggml.merges: expected two pieces with a space between them, got {quoted(merge)}",
            field="tokenizer.ggml.merges",
        )
    return left, right


def _scores(header: GgufHeader) -> list[float]:
    key, num_tokens = "tokenizer.ggml.scores", len(_tokens(header))
    found = header.metadata.get(key)
    if not isinstance(found, list) or len(found) != num_tokens or not all(type(item) is float for item in found):
        raise wrong(header.metadata, key, f"a number for each of the {num_tokens} tokens")
    return found


def _merges_from_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: every way to cut a token into two tokens is one, the best-scored first."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, index in vocabulary.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked.extend((-scores[index], -len(left), -len(right), (left, right)) for left, right in known)
    ranked.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in ranked]


def _add_marked_tokens(tokenizer: Tokenizer, header: GgufHeader) -> None:
    """Control tokens are special; user-defined ones are ordinary text that is never cut."""
    types = token_ids(header.metadata, "tokenizer.ggml.token_type")  # whole numbers too, one for each token
    marked = list(zip(_tokens(header), types, strict=False))
    control = [text for text, kind in marked if kind == TokenType.CONTROL]
    whole = [text for text, kind in marked if kind == TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])


def _tokens(header: GgufHeader) -> list[str]:
    tokens = names(header.metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise UnsupportedModel(f"{header.path.name} holds no vocabulary (tokenizer.ggml.tokens)")
    return tokens


def _vocabulary(header: GgufHeader) -> dict[str, int]:
    return {token: index for index, token in enumerate(_tokens(header))}
