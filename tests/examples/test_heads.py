"""The heads that ship are for the embedded base, small, and as good as the report beside them says."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tasks import TASKS
from train_heads import write_prompts

from perseid_server.adapters.store import version_of
from perseid_server.speculation.heads_config import CONFIG_FILE, TENSORS_FILE, parse_config

FOLDER = Path(__file__).parents[2] / "examples" / "heads" / "base"
HIDDEN, VOCABULARY = 576, 49_152


def test_the_shipped_heads_are_whole():
    tensors = load_file(FOLDER / TENSORS_FILE)
    config = parse_config((FOLDER / CONFIG_FILE).read_bytes(), 4, VOCABULARY)
    others = json.loads((FOLDER / "config.json").read_text())
    heads, layers = range(others["medusa_num_heads"]), range(others["medusa_num_layers"])
    shapes = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
    assert {name: one.shape for name, one in tensors.items()} == {
        f"{head}.{layer}.linear.{name}": shape for head in heads for layer in layers for name, shape in shapes.items()
    }
    assert all(np.isfinite(one).all() and one.any() for one in tensors.values())
    assert config.adapter is None
    assert config.draft_vocabulary is not None
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6


def test_the_report_is_of_these_heads_and_of_the_adapters_that_ship():
    report = json.loads((FOLDER / "report.json").read_text())
    config = parse_config((FOLDER / CONFIG_FILE).read_bytes(), 4, VOCABULARY)
    assert report["accuracy"]["all"] == [list(of_head) for of_head in config.accuracy]
    assert report["adapters"] == {name: version_of(FOLDER.parents[1] / "adapters" / name) for name in TASKS}


def test_held_out_items_are_not_learned(tmp_path):
    asked = [json.loads(line) for line in write_prompts(tmp_path / "prompts.jsonl", []).read_text().splitlines()]
    for name, task in TASKS.items():
        prompts = {one["prompt"] for one in asked if one["adapter"] == name}
        assert len(prompts) == 400
        assert not prompts & {item.question for item in (*task.splits.held_out, *task.splits.dev)}
