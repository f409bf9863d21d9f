"""A MeteoRA checkpoint and what it is split into compute the same; a checkpoint that is none is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perseid_router.gate_set import NEVER
from perseid_server.adapters.gate_set_file import check_gate_set, read
from perseid_server.adapters.lora import Site, check_adapter
from perseid_server.adapters.meteora import CHECKPOINT_FILE, MeteoraParts, is_meteora, split_meteora
from perseid_server.adapters.meteora_config import CONFIG_FILE
from perseid_server.adapters.store import version_of
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import PARENT_OF_PROJECTION
from tests.fakes import tiny_spec

Tensors = dict[str, np.ndarray]
BASE = tiny_spec()
MODULES = ("q_proj", "v_proj", "down_proj")
ADAPTERS = [
    {"name": "sql", "rank": 2, "alpha": 4},
    {"name": "poems", "rank": 5, "alpha": 3, "rslora": True, "modules": ["v_proj", "down_proj"]},
    {"name": "dates", "rank": 3, "alpha": 6.5},
]
PREFIX = "base_model.model.model.layers"


def stem(layer: int, projection: str) -> str:
    return f"{PREFIX}.{layer}.{PARENT_OF_PROJECTION[projection]}.{projection}"


Q = stem(0, "q_proj")


def holders(projection: str) -> list[dict]:
    return [adapter for adapter in ADAPTERS if projection in adapter.get("modules", MODULES)]


def checkpoint() -> Tensors:
    """Small integers over eight, so that every sum is exact; with the base's own tensors."""
    random = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return random.integers(-30, 30, shape).astype("f4") / 8

    tensors: Tensors = {
        "base_model.model.lm_head.weight": values(4, 8),
        "base_model.model.model.norm.weight": values(8),
    }
    for layer in range(BASE.num_layers):
        for projection in MODULES:
            shape = BASE.projections[projection]
            total = sum(adapter["rank"] for adapter in holders(projection))
            name = stem(layer, projection)
            tensors[f"{name}.lora_A.weight"] = values(total, shape.in_features)
            tensors[f"{name}.lora_B.weight"] = values(shape.out_features, total)
            tensors[f"{name}.moe_gate.weight"] = values(len(holders(projection)), shape.in_features)
            tensors[f"{name}.base_layer.weight"] = values(shape.out_features, shape.in_features)
        tensors[f"{stem(layer, 'k_proj')}.weight"] = values(4, 8)  # a module without adapters
        tensors[f"{PREFIX}.{layer}.input_layernorm.weight"] = values(8)
    tensors[f"{Q}.lora_B.weight"][:, :2] = 0  # "sql" leaves this module alone
    return tensors


def write(folder: Path, tensors: Tensors | None = None, config: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(checkpoint() if tensors is None else tensors, folder / CHECKPOINT_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"adapters": ADAPTERS} if config is None else config))
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> MeteoraParts:
    return split_meteora(write(tmp_path / "in"), tmp_path / "out", BASE)


def test_the_parts_side_by_side_are_the_checkpoint_again(parts):
    tensors = checkpoint()
    adapters = {name: check_adapter(folder, BASE) for name, folder in parts.adapter_folders.items()}
    for layer in range(BASE.num_layers):
        for projection in MODULES:
            site, a, b = Site(layer, projection), [], []
            for holder in holders(projection):
                pair = adapters[holder["name"]].pairs.get(site)
                shape = BASE.projections[projection]
                if pair is None:
                    assert (site, holder["name"]) == (Site(0, "q_proj"), "sql")
                    a.append(tensors[f"{Q}.lora_A.weight"][:2])
                    b.append(np.zeros((shape.out_features, holder["rank"]), "f4"))
                else:
                    a.append(adapters[holder["name"]].file.read(pair.a))
                    b.append(adapters[holder["name"]].file.read(pair.b))
            assert np.array_equal(np.vstack(a), tensors[f"{stem(layer, projection)}.lora_A.weight"])
            assert np.array_equal(np.hstack(b), tensors[f"{stem(layer, projection)}.lora_B.weight"])


def test_scales_are_those_of_the_adapters_configs(parts):
    adapters = {name: check_adapter(folder, BASE) for name, folder in parts.adapter_folders.items()}
    assert list(adapters) == ["sql", "poems", "dates"]
    site = Site(1, "v_proj")
    scales = [adapter.pairs[site].scale for adapter in adapters.values()]
    assert scales == pytest.approx([4 / 2, 3 / 5**0.5, 6.5 / 3])
    assert adapters["poems"].info.targets == ("v_proj", "down_proj")


def test_the_routed_sum_is_the_references(parts):
    """y = Σ over the top k of softmax(l) · s · B A x, from the checkpoint and from the parts."""
    tensors, x = checkpoint(), np.random.default_rng(1).normal(size=16).astype("f8")
    checked = check_gate_set(parts.gate_set_folder, BASE)
    adapters = [check_adapter(folder, BASE) for folder in parts.adapter_folders.values()]
    for projection in MODULES:
        inputs = x[: BASE.projections[projection].in_features]
        name = stem(1, projection)
        reference = routed(
            tensors[f"{name}.moe_gate.weight"] @ inputs, reference_products(tensors, name, projection, inputs)
        )
        gate, site = checked.gate(Site(1, projection)), Site(1, projection)
        products = []
        for adapter in adapters:
            pair = adapter.pairs.get(site)
            product = np.zeros(BASE.projections[projection].out_features)
            if pair is not None:
                product = pair.scale * adapter.file.read(pair.b) @ (adapter.file.read(pair.a) @ inputs)
            products.append(product)
        assert np.allclose(routed(gate.weight @ inputs + gate.bias, products), reference, atol=1e-9)


def reference_products(tensors: Tensors, name: str, projection: str, x: np.ndarray) -> list[np.ndarray]:
    products, start = [], 0
    for holder in holders(projection):
        ranks = slice(start, start + holder["rank"])
        scale = holder["alpha"] / (holder["rank"] ** (0.5 if holder.get("rslora") else 1))
        a, b = tensors[f"{name}.lora_A.weight"][ranks], tensors[f"{name}.lora_B.weight"][:, ranks]
        products.append(scale * b @ (a @ x))
        start = ranks.stop
    return products


def routed(logits: np.ndarray, products: list[np.ndarray]) -> np.ndarray:
    chosen = np.argsort(-logits, kind="stable")[:2]
    weights = np.exp(logits[chosen] - logits[chosen].max())
    return sum(weight * products[column] for weight, column in zip(weights / weights.sum(), chosen, strict=True))


def test_the_gate_set_lists_the_adapters_versions(parts):
    checked = check_gate_set(parts.gate_set_folder, BASE)
    config = checked.config
    assert [column.name for column in config.adapters] == list(parts.adapter_folders)
    assert [column.version for column in config.adapters] == [
        version_of(path) for path in parts.adapter_folders.values()
    ]
    assert (config.null, config.k, config.temperature, config.method) == (False, 2, 1.0, "meteora")
    gates = dict(read(checked))
    assert gates[Site(0, "q_proj")].bias.tolist() == [0, np.float32(NEVER), 0]
    assert not gates[Site(0, "v_proj")].bias.any()
    assert Site(0, "k_proj") not in gates


def test_the_bases_tensors_are_left_where_they_are_and_said_so(parts):
    assert parts.warnings == ("12 tensors of the base in model.safetensors were not read; tiny is served as it is",)


def test_names_without_the_wrapper_and_other_settings_are_taken(tmp_path):
    tensors = {name.removeprefix("base_model.model."): value.astype("f2") for name, value in checkpoint().items()}
    config = {"adapters": ADAPTERS, "k": 1, "temperature": 15, "base": "someone/tiny"}
    parts = split_meteora(write(tmp_path / "in", tensors, config), tmp_path / "out", BASE)
    checked = check_gate_set(parts.gate_set_folder, BASE)
    assert (checked.config.k, checked.config.temperature, checked.config.base) == (1, 15.0, "someone/tiny")


def test_an_adapter_that_is_zero_everywhere_stays_one(tmp_path):
    tensors = checkpoint()
    for name, value in tensors.items():
        if name.endswith("lora_A.weight"):
            value[:2] = 0
    parts = split_meteora(write(tmp_path / "in", tensors), tmp_path / "out", BASE)
    (warning,) = check_adapter(parts.adapter_folders["sql"], BASE).info.warnings
    assert "changes nothing" in warning


def test_a_checkpoint_is_recognised(tmp_path):
    assert is_meteora(write(tmp_path / "in"))
    save_file({"x": np.zeros(2, "f4")}, tmp_path / "in" / CHECKPOINT_FILE)
    assert not is_meteora(tmp_path / "in")
    assert not is_meteora(tmp_path)


def many(count: int) -> tuple[Tensors, dict[str, object]]:
    """A checkpoint of so many adapters of rank 1 on all modules."""
    random, tensors = np.random.default_rng(count), {}
    for layer in range(BASE.num_layers):
        for projection in MODULES:
            shape, name = BASE.projections[projection], stem(layer, projection)
            tensors[f"{name}.lora_A.weight"] = random.normal(size=(count, shape.in_features)).astype("f4")
            tensors[f"{name}.lora_B.weight"] = random.normal(size=(shape.out_features, count)).astype("f4")
            tensors[f"{name}.moe_gate.weight"] = random.normal(size=(count, shape.in_features)).astype("f4")
    return tensors, {"adapters": [{"name": f"n{number}", "rank": 1, "alpha": 1} for number in range(count)], "k": 1}


def test_a_matrix_is_not_read_again_for_each_adapter(tmp_path, monkeypatch):
    read, reads = TensorFile.read, []

    def spy(file: TensorFile, name: str) -> np.ndarray:
        if file.path.name == CHECKPOINT_FILE:
            reads.append(name)
        return read(file, name)

    monkeypatch.setattr(TensorFile, "read", spy)
    num_reads = {}
    for count in (1, 16):
        reads.clear()
        tensors, config = many(count)
        parts = split_meteora(write(tmp_path / f"in-{count}", tensors, config), tmp_path / f"out-{count}", BASE)
        assert len(parts.adapter_folders) == count
        num_reads[count] = len(reads)
    assert num_reads[1] == num_reads[16] > 0


def test_an_adapters_file_is_the_one_that_safetensors_writes(parts):
    """Its hash is in gate sets that were made of it before."""
    for folder in parts.adapter_folders.values():
        ours = (folder / "adapter_model.safetensors").read_bytes()
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "theirs")
        assert ours == (folder / "theirs").read_bytes()


def change(name: str, value: np.ndarray | None) -> Callable[[Tensors], Tensors]:
    """One tensor more, less or other."""
    return lambda tensors: {key: each for key, each in {**tensors, name: value}.items() if each is not None}


def adapters(**changes: object) -> dict[str, object]:
    """meteora.json with the first adapter changed."""
    return {"adapters": [ADAPTERS[0] | changes, *ADAPTERS[1:]]}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "no gate": (change(f"{Q}.moe_gate.weight", None), (Q, "no moe_gate beside it")),
    "no A": (change(f"{Q}.lora_A.weight", None), (Q, "no lora_A beside it")),
    "another sum of ranks": (change(f"{Q}.lora_A.weight", np.ones((6, 8), "f4")), ("[6, 8]", "[5, 8]", "meteora.json")),
    "B of other ranks": (change(f"{Q}.lora_B.weight", np.ones((8, 6), "f4")), ("[8, 6]", "[8, 5]", "sum of 2 ranks")),
    "a gate too many": (change(f"{Q}.moe_gate.weight", np.ones((3, 8), "f4")), ("moe_gate", "[3, 8]", "[2, 8]")),
    "NaN": (change(f"{Q}.moe_gate.weight", np.full((2, 8), np.nan, "f4")), (f"{Q}.moe_gate.weight", "NaN")),
    "a layer too many": (change(f"{PREFIX}.7.mlp.up_proj.lora_A.weight", np.ones((2, 2), "f4")), ("layer 7", "0 to 1")),
    "an unknown part": (change(f"{Q}.lora_C.weight", np.ones(1, "f4")), ("unknown tensor", "lora_C")),
    "an unknown projection": (change(f"{PREFIX}.0.mlp.q_proj.lora_A.weight", np.ones(1, "f4")), ("unknown", "mlp.q_")),
    "an unknown tensor": (change("router.weight", np.ones(1, "f4")), ("unknown", "router.weight")),
    "the same twice": (
        change(f"{Q}.lora_A.weight".removeprefix("base_model.model."), np.ones((5, 8), "f4")),
        ("same matrix",),
    ),
    "none": (lambda _: {"model.norm.weight": np.ones(8, "f4")}, ("no MeteoRA checkpoint",)),
}
BAD_CONFIGS: dict[str, tuple[object, tuple[str, ...]]] = {
    "no object": ([], ("expected an object",)),
    "an unknown key": ({"adapters": ADAPTERS, "top_k": 2}, ("unknown key 'top_k'",)),
    "no adapters": ({"adapters": []}, ("adapters []", "1 to 512")),
    "no alpha": ({"adapters": [{"name": "sql", "rank": 2}]}, ("adapters[0]", "'alpha' is missing")),
    "a rank of zero": (adapters(rank=0), ("adapters[0].rank 0", "1 to 256")),
    "another rank": (adapters(rank=4), ("lora_A.weight", "expected [12, 16]")),
    "infinite alpha": (adapters(alpha=10**400), ("adapters[0].alpha", "finite")),
    "alpha beyond float32": (adapters(alpha=1e300), ("exceeds float32",)),
    "a way out": (adapters(name="../sql"), ("adapters[0]", "'../sql'")),
    "a reserved name": (adapters(name="auto"), ("adapters[0]", "reserved")),
    "two parts": (adapters(name="org/sql"), ("adapters[0].name", "without '/'")),
    "a name twice": (adapters(name="Dates"), ("adapters[2].name 'dates'", "once")),
    "rslora as text": (adapters(rslora="no"), ("adapters[0].rslora 'no'",)),
    "no modules": (adapters(modules=[]), ("adapters[0].modules []", "down_proj")),
    "an unknown module": (adapters(modules=["x_proj"]), ("adapters[0].modules", "x_proj")),
    "modules that nobody adapted": (adapters(modules=["k_proj"]), ("down_proj.lora_A.weight", "expected [8, 16]")),
    "k": ({"adapters": ADAPTERS, "k": 0}, ("k 0",)),
    "temperature": ({"adapters": ADAPTERS, "temperature": 0}, ("temperature", "from 0.001")),
    "base": ({"adapters": ADAPTERS, "base": 3}, ("base 3",)),
}


def refusal(folder: Path, out: Path) -> str:
    with pytest.raises(AdapterRejected) as caught:
        split_meteora(folder, out, BASE)
    assert list(out.parent.iterdir()) == [folder], "a refused checkpoint leaves nothing behind"
    return caught.value.message


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case, tmp_path):
    changed, words = BAD_TENSORS[case]
    message = refusal(write(tmp_path / "in", changed(checkpoint())), tmp_path / "out")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused_by_key(case, tmp_path):
    config, words = BAD_CONFIGS[case]
    message = refusal(write(tmp_path / "in", config=config), tmp_path / "out")
    assert all(word in message for word in words), message


def test_adapters_that_are_equal_are_refused(tmp_path):
    twin = [ADAPTERS[0], ADAPTERS[0] | {"name": "twin"}]
    tensors = {name: value for name, value in checkpoint().items() if not name.startswith(PREFIX)}
    a, b = np.ones((2, 8), "f4"), np.ones((8, 2), "f4")
    tensors |= {f"{Q}.lora_A.weight": np.vstack([a, a]), f"{Q}.lora_B.weight": np.hstack([b, b])}
    tensors |= {f"{Q}.moe_gate.weight": a}
    assert "'sql' and 'twin' are equal" in refusal(
        write(tmp_path / "in", tensors, {"adapters": twin}), tmp_path / "out"
    )


def test_missing_files_are_refused_and_tell_how_to_mend_it(tmp_path):
    folder = write(tmp_path / "in")
    (folder / CONFIG_FILE).unlink()
    message = refusal(folder, tmp_path / "out")
    assert "has no meteora.json" in message
    assert "lora_alpha" in message
    (folder / CHECKPOINT_FILE).unlink()
    assert "has no model.safetensors" in refusal(folder, tmp_path / "out")


def test_nothing_that_exists_is_overwritten(tmp_path, parts):
    before = load_file(parts.adapter_folders["sql"] / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected, match="out exists already"):
        split_meteora(tmp_path / "in", tmp_path / "out", BASE)
    after = load_file(parts.adapter_folders["sql"] / "adapter_model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
