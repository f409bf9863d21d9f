"""Adapters that change Medusa heads: accepted, refused, and lowered to the products that PEFT computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import nn

from perseid_server.adapters.lora import MAX_HEADS, HeadSite, check_adapter
from perseid_server.adapters.lowering import HEADS, HEADS_LAYER, lower, lower_heads
from perseid_server.adapters.pool import AdapterPool
from perseid_server.errors import AdapterRejected
from perseid_server.speculation import heads_config
from tests.fakes import tiny_spec
from tests.server.adapters.folders import lora_config, lora_tensors, write_adapter

BASE = tiny_spec()
SIZE = BASE.hidden_size


def name(head: int, side: str) -> str:
    return f"base_model.model.medusa_head.{head}.0.linear.lora_{side}.weight"


def head_tensors(*heads: int, rank: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    pairs = {name(head, "A"): draw.normal(size=(rank, SIZE)).astype("f4") for head in heads}
    return pairs | {name(head, "B"): draw.normal(size=(SIZE, rank)).astype("f4") for head in heads}


class Medusa(nn.Module):
    """The heads of a Medusa model, as its modules are named."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.ModuleDict({"linear": nn.Linear(SIZE, SIZE)})) for _ in range(3)]
        self.medusa_head = nn.ModuleList(blocks)
        self.config = {"model_type": "custom"}

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block[0]["linear"](x) for block in self.medusa_head]


def test_both_name_as_many_heads() -> None:
    assert MAX_HEADS == heads_config.MAX_HEADS


def test_products_are_pefts(tmp_path: Path) -> None:
    """Written by PEFT, which adapts heads 0 and 2 with rank 3 and alpha 5."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=r"medusa_head\.[02]\.0\.linear", init_lora_weights=False)
    plain = Medusa()
    x = torch.randn(4, SIZE)
    before = [out.detach() for out in plain(x)]
    adapted = get_peft_model(plain, config)
    deltas = [after.detach() - out for after, out in zip(adapted(x), before, strict=True)]
    adapted.save_pretrained(tmp_path)
    checked = check_adapter(tmp_path, BASE)
    assert checked.info.heads == (0, 2)
    (linear,) = lower_heads(checked, BASE)
    assert list(lower(checked, BASE)) == []
    for head in range(3):
        pair = linear.pairs[head]
        if pair is None:
            assert head == 1
            assert deltas[head].abs().max() == 0
            continue
        product = x @ torch.from_numpy(pair.a).T @ torch.from_numpy(pair.b)
        torch.testing.assert_close(product, deltas[head], rtol=0, atol=1e-5)


def test_beside_the_bases_projections(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE) | head_tensors(1)
    config = lora_config(target_modules=["q_proj", "v_proj", "down_proj", "linear"])
    checked = check_adapter(write_adapter(tmp_path, tensors=tensors, config=config), BASE)
    assert set(checked.head_pairs) == {HeadSite(1)}
    assert len(checked.pairs) == 6
    assert checked.info.heads == (1,)
    (linear,) = lower_heads(checked, BASE)
    assert (linear.layer, linear.fused, len(linear.pairs)) == (HEADS_LAYER, HEADS, MAX_HEADS)


def test_pages_hold_them_and_forget_them(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE) | head_tensors(0)
    config = lora_config(target_modules=["q_proj", "v_proj", "down_proj", "linear"])
    both = check_adapter(write_adapter(tmp_path / "both", tensors=tensors, config=config), BASE)
    plain = check_adapter(write_adapter(tmp_path / "plain"), BASE)
    pool = AdapterPool(BASE, 2, torch.device("cpu"), torch.float32)
    pool.write((1,), [*lower(both, BASE), *lower_heads(both, BASE)])
    assert pool.changes_heads((1,))
    assert not pool.changes_heads((0,))
    assert pool.heads.live[1].tolist() == [4, *[0] * 7]
    stored = load_file(tmp_path / "both" / "adapter_model.safetensors")
    np.testing.assert_array_equal(pool.heads.a[1, :4].numpy(), stored[name(0, "A")])
    pool.write((1,), lower(plain, BASE))
    assert not pool.changes_heads((1,))
    assert not pool.heads.a.any()


def test_a_write_that_fails_half_way_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE) | head_tensors(0, 1)
    config = lora_config(target_modules=["q_proj", "v_proj", "down_proj", "linear"])
    both = check_adapter(write_adapter(tmp_path / "both", tensors=tensors, config=config), BASE)
    plain = check_adapter(write_adapter(tmp_path / "plain"), BASE)
    (of_heads,) = lower_heads(both, BASE)
    pool = AdapterPool(BASE, 2, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError):
        pool.write((1,), [*lower(both, BASE), replace(of_heads, pairs=of_heads.pairs[:1], widths=(SIZE,))])
    pool.write((1,), lower(plain, BASE))
    assert not pool.changes_heads((1,))
    assert not any(tensor.any() for tensor in (pool.heads.a, pool.heads.b, pool.heads.live))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({name(0, "B"): None}, ("medusa_head.0.0.linear.lora_A", "no lora_B")),
        ({name(0, "A"): np.ones((4, SIZE + 1), "f4")}, (f"[4, {SIZE + 1}]", f"[4, {SIZE}]")),
        ({name(8, "A"): np.ones((4, SIZE), "f4")}, ("unknown tensor", "medusa_head.8")),
        ({name(0, "A"): np.full((4, SIZE), np.nan, "f4")}, ("NaN",)),
        (
            {"base_model.model.medusa_head.0.1.linear.lora_A.weight": np.ones((4, SIZE), "f4")},
            ("unknown tensor", "medusa_head.0.1"),
        ),
    ],
    ids=["no B", "another size", "a ninth head", "NaN", "a second block"],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, np.ndarray | None], told: tuple[str, ...]) -> None:
    tensors = {key: value for key, value in (head_tensors(0) | change).items() if value is not None}
    folder = write_adapter(tmp_path, tensors=tensors, config=lora_config(target_modules=["linear"]))
    with pytest.raises(AdapterRejected) as refused:
        check_adapter(folder, BASE)
    for part in told:
        assert part in str(refused.value)
