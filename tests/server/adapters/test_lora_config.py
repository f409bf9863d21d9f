"""The config is read strictly: each field that would change the answer is refused by its own name."""

import json
import os
from pathlib import Path

import pytest

from perseid_server.adapters.lora_config import CONFIG_FILE, read_lora_config
from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES
from perseid_server.errors import AdapterRejected
from tests.server.adapters.folders import lora_config

# What is wrong with it → what the message says.
BAD_FIELDS: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"peft_type": "IA3"}, ("peft_type 'IA3'", "supported: LORA")),
    ({"peft_type": "PROMPT_TUNING"}, ("peft_type 'PROMPT_TUNING'",)),
    ({"peft_type": "PREFIX_TUNING"}, ("peft_type 'PREFIX_TUNING'",)),
    ({"peft_type": "ADALORA"}, ("peft_type 'ADALORA'",)),
    ({"peft_type": None}, ("peft_type None",)),
    ({"peft_type": ["LORA"]}, ("peft_type ['LORA']",)),
    ({"bias": "all"}, ("bias 'all'", 'expected "none"')),
    ({"bias": "lora_only"}, ("bias 'lora_only'",)),
    ({"bias": None}, ("bias None",)),
    ({"use_dora": True}, ("use_dora True", "DoRA")),
    ({"lora_bias": True}, ("lora_bias True", "bias on lora_B")),
    ({"modules_to_save": ["lm_head"]}, ("modules_to_save ['lm_head']",)),
    ({"trainable_token_indices": [1, 2]}, ("trainable_token_indices [1, 2]",)),
    ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication", "depth")),
    ({"target_parameters": ["mlp.experts"]}, ("target_parameters",)),
    ({"fan_in_fan_out": True}, ("fan_in_fan_out", "Conv1D")),
    ({"megatron_config": {"x": 1}}, ("megatron_config",)),
    ({"alora_invocation_tokens": [5]}, ("alora_invocation_tokens",)),
    ({"use_qalora": True}, ("use_qalora", "QALoRA")),
    ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora",)),
    ({"arrow_config": {"top_k": 3}}, ("arrow_config",)),
    ({"kasa_config": {"beta": 1}}, ("kasa_config",)),
    ({"loftq_config": {"loftq_bits": 4}}, ("loftq_config",)),
    ({"velora_config": {"x": 1}}, ("velora_config",)),
    ({"monteclora_config": {"x": 1}}, ("monteclora_config",)),
    ({"init_lora_weights": "pissa"}, ("init_lora_weights 'pissa'", "path_initial_model_for_weight_conversion")),
    ({"init_lora_weights": "pissa_niter_16"}, ("init_lora_weights 'pissa_niter_16'",)),
    ({"init_lora_weights": "olora"}, ("init_lora_weights 'olora'",)),
    ({"init_lora_weights": "loftq"}, ("init_lora_weights 'loftq'",)),
    ({"init_lora_weights": ["gaussian"]}, ("init_lora_weights ['gaussian']",)),
    ({"a_new_trick": 1}, ("unknown key 'a_new_trick'", "remove it")),
    ({"a_new_trick": 0}, ("unknown key 'a_new_trick'",)),
    ({"r": 0}, ("r 0:", "from 1 to 256")),
    ({"r": -4}, ("r -4:",)),
    ({"r": 257}, ("r 257:", "from 1 to 256")),
    ({"r": 8.0}, ("r 8.0:", "integer")),
    ({"r": "8"}, ("r '8':",)),
    ({"r": True}, ("r True:",)),
    ({"r": None}, ("r None:",)),
    ({"lora_alpha": float("nan")}, ("lora_alpha nan", "finite")),
    ({"lora_alpha": float("inf")}, ("lora_alpha inf", "finite")),
    ({"lora_alpha": 10**400}, ("lora_alpha 1000", "finite")),
    ({"lora_alpha": "16"}, ("lora_alpha '16'",)),
    ({"lora_alpha": None}, ("lora_alpha None",)),
    ({"lora_alpha": True}, ("lora_alpha True",)),
    ({"use_rslora": "yes"}, ("use_rslora 'yes'", "true or false")),
    ({"use_rslora": 1}, ("use_rslora 1",)),
    ({"rank_pattern": {"q_proj": 300}}, ("rank_pattern['q_proj'] 300", "256")),
    ({"rank_pattern": {"q_proj": "4"}}, ("rank_pattern['q_proj'] '4'",)),
    ({"rank_pattern": ["q_proj"]}, ("rank_pattern ['q_proj']", "object")),
    ({"rank_pattern": 0}, ("rank_pattern 0", "object")),
    ({"rank_pattern": {"q_proj(": 4}}, ("rank_pattern 'q_proj('", "expression")),
    ({"rank_pattern": {"(?i)q_proj": 4}}, ("rank_pattern '(?i)q_proj'",)),
    ({"rank_pattern": {f"m{i}": 4 for i in range(4097)}}, ("rank_pattern has 4097 keys", "4096")),
    ({"rank_pattern": {f".*{'x' * 200}{i}": 4 for i in range(30)}}, ("rank_pattern holds expressions", "4096")),
    ({"alpha_pattern": {"q_proj": float("nan")}}, ("alpha_pattern['q_proj'] nan",)),
    ({"alpha_pattern": {"q_proj": [1]}}, ("alpha_pattern['q_proj'] [1]",)),
    ({"alpha_pattern": "q_proj"}, ("alpha_pattern 'q_proj'", "object")),
    ({"target_modules": {"q_proj": 1}}, ("target_modules", "list of module names")),
    ({"target_modules": ["q_proj", 3]}, ("target_modules ['q_proj', 3]",)),
    ({"target_modules": 7}, ("target_modules 7",)),
    ({"base_model_name_or_path": 7}, ("base_model_name_or_path 7", "string")),
    ({"base_model_name_or_path": "x" * 2000}, ("base_model_name_or_path", "1024")),
]

BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "not valid JSON"),
    ("not JSON", b"peft_type: LORA", "not valid JSON"),
    ("not UTF-8", b'{"peft_type": "\xff"}', "not valid JSON"),
    ("a list", b"[]", "expected an object, got list"),
    ("a number", b"3", "expected an object, got int"),
    ("null", b"null", "expected an object, got NoneType"),
    ("nested deeply", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("too large", b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ("a key twice", b'{"peft_type": "LORA", "r": 8, "r": 4}', "the key 'r' appears twice"),
    ("an inner key twice", b'{"rank_pattern": {"q_proj": 8, "q_proj": 4}}', "the key 'q_proj' appears twice"),
    ("half a character", rb'{"peft_type": "LORA", "base_model_name_or_path": "\ud800"}', "surrogates"),
    ("a number without end", b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
]

HARMLESS: list[dict[str, object]] = [
    {},
    {"use_dora": None, "modules_to_save": [], "loftq_config": {}, "layer_replication": None},
    {"a_new_trick": None, "another": False, "third": [], "fourth": {}, "fifth": ""},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": None},
    {"target_modules": "all-linear"},
    {"rank_pattern": None, "alpha_pattern": None},
    {"lora_alpha": 0.5},
    {"eva_config": {"rho": 2.0}, "corda_config": None, "runtime_config": {"ephemeral_gpu_offload": False}},
    {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["o_proj"]},
    {"base_model_name_or_path": None, "auto_mapping": {"base_model_class": "X"}, "revision": "main"},
]


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterRejected) as caught:
        read_lora_config(folder)
    return caught.value.message


@pytest.mark.parametrize(("changes", "words"), BAD_FIELDS, ids=[str(changes)[:50] for changes, _ in BAD_FIELDS])
def test_a_bad_field_is_refused_by_its_name(changes, words, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(lora_config(**changes)))
    message = refusal(tmp_path)
    assert all(word in message for word in words), message
    assert len(message) < 600


@pytest.mark.parametrize(("raw", "words"), [file[1:] for file in BAD_FILES], ids=[file[0] for file in BAD_FILES])
def test_a_bad_file_is_refused(raw, words, tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(raw)
    message = refusal(tmp_path)
    assert words in message
    assert CONFIG_FILE in message


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_what_does_not_change_the_answer_is_accepted(changes, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(lora_config(**changes)))
    read_lora_config(tmp_path)


def test_a_config_that_is_missing_or_no_file_is_refused_without_waiting(tmp_path):
    assert "has no adapter_config.json" in refusal(tmp_path)
    path = tmp_path / CONFIG_FILE
    os.mkfifo(path)
    assert "not a regular file" in refusal(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in refusal(tmp_path)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "has no adapter_config.json" in refusal(tmp_path / "file")
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


def test_a_long_value_is_quoted_briefly(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(lora_config(bias="x" * 100_000, peft_version=None)))
    assert len(refusal(tmp_path)) < 400


def test_missing_rank_and_alpha_are_pefts_defaults(tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    config = read_lora_config(tmp_path)
    assert (config.rank, config.alpha, config.rslora, config.named_targets) == (8, 8, False, ())
