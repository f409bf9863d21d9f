"""Text streams back exactly, whatever the token boundaries; stop texts are found as in the whole text."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from perseid_server.frontend.detokenizer import Detokenizer, Piece, StopWatch
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WHOLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def stream(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[Piece]:
    """Feed tokens in groups of the given sizes, over and over, up to a stop; then finish."""
    pieces, start, place = [], 0, 0
    while start < len(token_ids):
        size = sizes[place % len(sizes)]
        pieces.append(detokenizer.feed(token_ids[start : start + size]))
        if pieces[-1].stop is not None:
            return pieces
        start, place = start + size, place + 1
    return [*pieces, detokenizer.finish()]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def cut_at_stop(text: str, stops: tuple[str, ...], *, keep: bool) -> tuple[str, str | None]:
    """The definition: read letter by letter; the first stop text to be complete ends it, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if keep else text[: end - len(stop)]), stop
    return text, None


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(WHOLE, SIZES)
@example("👩‍👩‍👧‍👦 e\u0301 🇫🇷 नमस्ते", [1])
@example("\u200d", [1])
@example("a\u0000b\r\n", [2])
def test_valid_text_streams_back_exactly_and_never_as_replacement_characters(text: str, sizes: list[int]) -> None:
    token_ids = list(text.encode())
    pieces = stream(Detokenizer(TOKENIZER), token_ids, sizes)
    assert text_of(pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)


@given(TEXT)
def test_text_that_holds_a_replacement_character_itself_streams_back_exactly(text: str) -> None:
    assert text_of(stream(Detokenizer(TOKENIZER), list(text.encode()), [1])) == text


@given(st.lists(st.integers(0, 255), max_size=12), SIZES)
def test_broken_bytes_stream_as_the_whole_decodes(token_ids: list[int], sizes: list[int]) -> None:
    assert text_of(stream(Detokenizer(TOKENIZER), token_ids, sizes)) == TOKENIZER.decode(token_ids)


def test_a_character_cut_off_by_the_end_is_told_as_broken() -> None:
    assert text_of(stream(Detokenizer(TOKENIZER), list("a😀".encode())[:-1], [1])) == "a\ufffd"


@given(st.lists(st.integers(0, 258), max_size=12))
def test_a_byte_fallback_vocabulary_survives_any_tokens(token_ids: list[int]) -> None:
    """There, a run of bytes is text or all broken: a later byte can take back what was sent."""
    detokenizer = Detokenizer(byte_fallback_tokenizer())
    assert isinstance(text_of(stream(detokenizer, token_ids, [1])), str)


def test_text_goes_on_after_bytes_that_break_what_was_sent() -> None:
    tokenizer = byte_fallback_tokenizer()
    broken = [tokenizer.token_to_id(token) for token in ("<0x40>", "<0x80>", "a", "a")]
    assert text_of(stream(Detokenizer(tokenizer), broken, [1])).endswith("aa")


@given(st.text("abcx", max_size=20), STOPS, SIZES, st.booleans())
def test_stop_texts_end_the_answer_where_they_are_first_complete(
    text: str, stops: tuple[str, ...], sizes: list[int], keep: bool
) -> None:
    pieces = stream(Detokenizer(TOKENIZER, stops, keep_stop=keep), list(text.encode()), sizes)
    assert (text_of(pieces), pieces[-1].stop) == cut_at_stop(text, stops, keep=keep)


@given(st.text("aé😀", max_size=12), st.lists(st.text("aé😀", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_texts_of_many_bytes_match_across_token_boundaries(text: str, stops: list[str]) -> None:
    pieces = stream(Detokenizer(TOKENIZER, tuple(stops)), list(text.encode()), [1])
    assert (text_of(pieces), pieces[-1].stop) == cut_at_stop(text, tuple(stops), keep=False)


@given(st.text("ab", max_size=16), STOPS, SIZES)
def test_no_piece_ever_holds_the_beginning_of_a_stop_text_that_follows(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    watch, sent, start = StopWatch(stops), "", 0
    for size in sizes * len(text):
        piece = watch.feed(text[start : start + size])
        sent, start = sent + piece.text, start + size
        allowed, _ = cut_at_stop(text, stops, keep=False)
        assert allowed.startswith(sent)
        if piece.stop is not None:
            return


def test_text_held_back_for_a_stop_that_never_came_is_sent_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("###",))
    assert detokenizer.feed(b"a##") == Piece("a")
    assert detokenizer.finish() == Piece("##")


def test_text_is_held_back_no_longer_than_it_may_become_a_stop_text() -> None:
    watch = StopWatch(("###",))
    assert [watch.feed(char).text for char in "a##b#"] == ["a", "", "", "##b", ""]


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<turn>b")])
def test_special_tokens_are_left_out_unless_asked_for(skip: bool, text: str) -> None:
    token_ids = [ord("a"), TOKENIZER.token_to_id("<turn>"), ord("b")]
    assert text_of(stream(Detokenizer(TOKENIZER, skip_special_tokens=skip), token_ids, [1])) == text


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral have it: a word piece, a space, and a token for each byte."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
