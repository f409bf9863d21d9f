"""What a folder holds is told by its files."""

import pytest

from perseid_server.adapters.layout import kind_of

MEDUSA = '{"architectures": ["MedusaModel"], "model_type": "medusa"}'
FOLDERS = {
    "nothing": ({}, "adapter"),
    "an adapter": ({"adapter_config.json": "{}"}, "adapter"),
    "an adapter beside all else": (
        {"adapter_config.json": "{}", "gate_set.json": "{}", "medusa_lm_head.safetensors": ""},
        "adapter",
    ),
    "gates": ({"gate_set.json": "{}"}, "gates"),
    "gates beside heads": ({"gate_set.json": "{}", "medusa_lm_head.safetensors": ""}, "gates"),
    "heads": ({"medusa_lm_head.safetensors": ""}, "heads"),
    "heads without tensors": ({"perseid_heads.json": "{}"}, "heads"),
    "a pickle": ({"medusa_lm_head.pt": ""}, "heads"),
    "vLLM's heads": ({"model.safetensors": "", "config.json": MEDUSA}, "heads"),
    "the config of a model_type": ({"config.json": '{"model_type": "medusa"}'}, "heads"),
    "the config of an architecture": ({"config.json": '{"architectures": ["MedusaModel"]}'}, "heads"),
    "the config of Medusa v1": ({"config.json": '{"medusa_num_heads": 3}'}, "heads"),
    "a model": ({"model.safetensors": "", "config.json": '{"architectures": ["LlamaForCausalLM"]}'}, "adapter"),
    "a config that is a list": ({"config.json": "[1]"}, "adapter"),
    "a config of odd types": ({"config.json": '{"architectures": 3, "model_type": ["medusa"]}'}, "adapter"),
    "a broken config": ({"config.json": "{"}, "adapter"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_kinds(tmp_path, case):
    files, kind = FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert kind_of(tmp_path) == kind
