"""As many adapters as there are pages of adapter memory, each of which takes a whole one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from perseid_loadtest import full_pool
from perseid_loadtest.soak import WIDE, _plan
from perseid_server.adapters.store import version_of
from tests.loadtest.traffic.fake_target import FakeTarget

EXAMPLE = Path("examples/adapters", WIDE)
PAGES = {"adapters": {"pages_used": 2, "pages_free": 3}}


class Remembering(FakeTarget):
    """A server that knows the content of what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[str] = []

    async def load(self, name: str, source: str, *, replace: bool) -> None:
        await super().load(name, source, replace=replace)
        self.versions.append(version_of(Path(source)))


async def test_each_page_has_an_adapter_of_its_own_which_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(full_pool, "get_json", lambda *_: PAGES)
    target = Remembering()
    assert await full_pool.fill_adapter_memory(target, "http://there", EXAMPLE, tmp_path, _plan(())) == 5
    names = [f"filler-{number}" for number in range(5)]
    assert sorted((request.adapter, request.output_tokens) for request in target.asked) == [(name, 1) for name in names]
    assert [change[:2] for change in target.changes] == [
        *(("load", name) for name in names),
        *(("unload", name) for name in names),
    ]
    assert len(set(target.versions)) == 5


def test_a_widened_adapter_has_rank_16_everywhere(tmp_path: Path):
    folder = full_pool.widened(EXAMPLE, tmp_path / "wide")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == full_pool.PAGE_RANK
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "lora_A" in name else 1] == full_pool.PAGE_RANK
        assert tensor.abs().sum() > 0
