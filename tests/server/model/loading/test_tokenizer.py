"""Tokenizers against transformers' own, on text that catches every splitting rule."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from perseid_server.errors import UnsupportedModel
from perseid_server.model.embedded import embedded_base
from perseid_server.model.gguf_tokenizer import SPLITTINGS, Splitting
from perseid_server.model.source import ModelSource, resolve_model
from perseid_server.model.tokenizer import TokenizerBundle, export_tokenizer

CORPUS = [
    "",
    "Hello world",
    " leading,  double and trailing spaces  ",
    "tabs\t\tand\nnew\n\n\nlines\r\n\r\n",
    "def f(x):\n    return x ** 2  # 12345, 67 and 8\n",
    "In 2024 the price was 1,234.56 €; 007 1000000",
    "I'm, you're, they've, WE'LL, 'tis",
    "🙂 👩‍👩‍👧 🇩🇪 emoji",
    "日本語のテスト 中文測試 한국어",
    "naïve café Übergröße Ελληνικά русский עברית",
    "\u00a0no-break\u2003em\u200bzero",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "text<|im_end|>glued<|im_start|> and <|not_special|>",
    '{"key": [1, 2.5, null], "path": "C:\\\\x"}',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def gguf_bundle(path: Path) -> TokenizerBundle:
    return export_tokenizer(ModelSource("gguf", path, "tiny", str(path)))


def original(splitting: Splitting) -> Tokenizer:
    """A small trained tokenizer, as the model's publisher would have made it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def write_vocabulary(path: Path, tokenizer: Tokenizer, pre: str, **metadata: Any) -> Path:
    """The tokenizer as convert_hf_to_gguf.py stores it."""
    stored = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    writer.add_bos_token_id(stored["vocab"]["<|im_start|>"])
    writer.add_eos_token_id(stored["vocab"]["<|im_end|>"])
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_gguf_vocabulary_gives_the_original_back(tmp_path: Path, pre: str) -> None:
    expected = original(SPLITTINGS[pre])
    bundle = gguf_bundle(write_vocabulary(tmp_path / "v.gguf", expected, pre, add_bos_token=False))
    for text in [*CORPUS, "e\u0301 decomposed"]:
        ids = expected.encode(text).ids
        assert bundle.tokenizer.encode(text).ids == ids, text
        assert bundle.tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(
            ids, skip_special_tokens=False
        )
    assert bundle.chat_template == TEMPLATE
    assert (bundle.bos_token, bundle.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (bundle.bos_token_id, bundle.eos_token_id, bundle.stop_token_ids) == (1, 2, (2,))
    assert not bundle.add_bos


def test_decoding_leaves_special_tokens_out_when_asked(tmp_path: Path) -> None:
    bundle = gguf_bundle(write_vocabulary(tmp_path / "v.gguf", original(SPLITTINGS["gpt-2"]), "gpt-2"))
    ids = bundle.tokenizer.encode("<|im_start|>hi<|im_end|>").ids
    assert bundle.tokenizer.decode(ids) == "hi"


def test_bos_is_added_where_the_file_asks_for_it(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", original(SPLITTINGS["gpt-2"]), "gpt-2", add_bos_token=True)
    bundle = gguf_bundle(path)
    with_bos = bundle.tokenizer.encode("hi").ids
    without = bundle.tokenizer.encode("hi", add_special_tokens=False).ids
    assert bundle.add_bos
    assert with_bos == [1, *without]


def test_llama3_adds_bos_unless_told_otherwise(tmp_path: Path) -> None:
    vocabulary = original(SPLITTINGS["llama-bpe"])
    assert gguf_bundle(write_vocabulary(tmp_path / "v.gguf", vocabulary, "llama-bpe")).add_bos
    told = write_vocabulary(tmp_path / "w.gguf", vocabulary, "llama-bpe", add_bos_token=False)
    assert not gguf_bundle(told).add_bos


def test_end_of_turn_stops_too(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", original(SPLITTINGS["gpt-2"]), "gpt-2", eot_token_id=0)
    assert gguf_bundle(path).stop_token_ids == (2, 0)


@pytest.mark.parametrize("pre", ["bert-bge", "default-but-wrong"])
def test_unknown_pre_tokenizer_is_refused(tmp_path: Path, pre: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"tokenizer.ggml.pre.*{pre}.*smollm"):
        gguf_bundle(write_vocabulary(tmp_path / "v.gguf", original(SPLITTINGS["gpt-2"]), pre))


@pytest.mark.parametrize("prefix_space", [True, False])
def test_sentencepiece_vocabulary_equals_transformers(tmp_path: Path, prefix_space: bool) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "h", "e", "l", "o", "w", "r", "d", "1", "2", ".", "el", "lo", "▁w", "or", "ell", "ld", "▁wor", "▁h"]
    words += ["▁hell", "▁hello", "▁world", "hello", "▁▁", "12"]
    scores = [0.0] * len(pieces) + [-float(rank) for rank in range(len(words))]
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix_space)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bundle = gguf_bundle(path)
    assert bundle.add_bos
    if not prefix_space:
        # transformers reads the flag from the file but builds its tokenizer without it; llama.cpp obeys it.
        ids = bundle.tokenizer.encode("hello", add_special_tokens=False).ids
        assert bundle.tokenizer.id_to_token(ids[0]) == "h"  # and not "▁h"
        assert bundle.tokenizer.decode(ids) == "hello"
        return
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ["hello world", "hello  world 12", "é 🙂", "  hello", "hellohello.", "hello</s>world"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert bundle.tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert bundle.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


# --- Hugging Face folders ---------------------------------------------------------------------------------------


def write_folder(folder: Path, **settings: Any) -> Tokenizer:
    tokenizer = original(SPLITTINGS["qwen2"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    return tokenizer


def folder_bundle(folder: Path) -> TokenizerBundle:
    return export_tokenizer(ModelSource("hf", folder, "tiny", str(folder)))


def test_folder(tmp_path: Path) -> None:
    expected = write_folder(tmp_path, chat_template=TEMPLATE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    bundle = folder_bundle(tmp_path)
    for text in CORPUS:
        assert bundle.tokenizer.encode(text).ids == expected.encode(text).ids
    assert bundle.chat_template == TEMPLATE
    assert bundle.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert bundle.stop_token_ids == (2, 0)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_of_several_templates_the_default_counts(tmp_path: Path, stated: object, expected: str | None) -> None:
    write_folder(tmp_path, chat_template=stated)
    assert folder_bundle(tmp_path).chat_template == expected


def test_template_file_wins(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert folder_bundle(tmp_path).chat_template == "new"


def test_tokens_stated_as_objects(tmp_path: Path) -> None:
    write_folder(tmp_path, bos_token={"__type": "AddedToken", "content": "<|endoftext|>"})
    bundle = folder_bundle(tmp_path)
    assert (bundle.bos_token, bundle.bos_token_id) == ("<|endoftext|>", 0)


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = write_folder(tmp_path)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = CORPUS[1] * 5
    assert folder_bundle(tmp_path).tokenizer.encode(text).ids == original(SPLITTINGS["qwen2"]).encode(text).ids


def test_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json.*save_pretrained"):
        folder_bundle(tmp_path)


def test_user_defined_tokens_stay_whole_and_visible(tmp_path: Path) -> None:
    tokenizer = original(SPLITTINGS["gpt-2"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    path = write_vocabulary(tmp_path / "v.gguf", tokenizer, "gpt-2")
    bundle = gguf_bundle(path)
    assert bundle.tokenizer.decode(bundle.tokenizer.encode("a<think>b").ids) == "a<think>b"


# --- the embedded base ------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_embedded_base_equals_transformers() -> None:
    path = embedded_base()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    bundle = export_tokenizer(resolve_model("embedded"))
    for text in CORPUS:
        ids = theirs.encode(text)
        assert bundle.tokenizer.encode(text).ids == ids, text
        assert bundle.tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text
    assert bundle.chat_template == theirs.chat_template
    assert (bundle.bos_token, bundle.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert bundle.stop_token_ids == (theirs.eos_token_id,)
