"""What the end-to-end proofs share: the embedded base, eight adapters, the reference, a running server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from perseid_server.model.embedded import embedded_base
from tests.e2e.prompts import prompt_ids
from tests.e2e.reference import RECIPES, Reference, load_reference, write_adapter
from tests.e2e.running import RunningServer, running_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is `e2e`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def base_gguf() -> Path:
    """The embedded base's file, fetched on first use."""
    return embedded_base()


@pytest.fixture(scope="session")
def reference_model(base_gguf: Path):
    return load_reference(base_gguf)


@pytest.fixture(scope="session")
def adapter_folders(reference_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters of different ranks and targets, saved by PEFT: name → folder."""
    root = tmp_path_factory.mktemp("adapters")
    return {recipe.name: write_adapter(reference_model, recipe, root / recipe.name) for recipe in RECIPES}


@pytest.fixture(scope="session")
def reference(base_gguf: Path, adapter_folders: dict[str, Path]) -> Reference:
    """PEFT with all eight adapters, on a model of its own: whoever writes an adapter with `reference_model` takes
    PEFT's layers out of it."""
    return Reference(load_reference(base_gguf), adapter_folders)


@pytest.fixture(scope="session")
def server(adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server with the eight adapters, shared by the tests that leave it as they found it."""
    named = [f"--adapter={name}={folder}" for name, folder in adapter_folders.items()]
    root = next(iter(adapter_folders.values())).parent
    store = tmp_path_factory.mktemp("server") / "store"
    with running_server(*named, "--adapter-root", str(root), store=store) as running:
        yield running


@pytest.fixture(scope="session")
def prompts(base_gguf: Path) -> list[tuple[int, ...]]:
    """Sixteen prompts of uneven lengths, as token ids."""
    return prompt_ids(base_gguf)
