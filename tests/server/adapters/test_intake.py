"""Medusa v1's pickles are taken in where the operator allows it, and become what everything else is stored as."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from perseid_server.adapters.intake import Intake
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Naming
from perseid_server.errors import AdapterRejected
from perseid_server.speculation.heads_file import HeadsInfo, check_heads
from tests.fakes import tiny_spec
from tests.server.speculation.heads_folders import medusa_v1, medusa_v2, write_heads


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def pickled(tmp_path: Path) -> AdapterFolder:
    folder = tmp_path / "pickled"
    folder.mkdir()
    tensors = {name: torch.from_numpy(values) for name, values in medusa_v1(2).items()}
    torch.save(tensors, folder / "medusa_lm_head.pt")
    (folder / "config.json").write_text('{"medusa_num_heads": 5}')
    return AdapterFolder(folder, follow_links=False)


def test_a_pickle_is_stored_as_safetensors_where_it_is_allowed(store, pickled):
    [arrival] = Intake(store, tiny_spec(), None, allow_pickle_heads=True).take("h", pickled)
    assert isinstance(arrival.content, HeadsInfo)
    assert arrival.content.warnings == ("config.json says medusa_num_heads 5; the tensors are of 2",)
    [entry] = store.commit([Naming("h", arrival.staged, "s")])
    folder = store.folder(entry.version)
    assert {path.name for path in folder.iterdir()} == {"medusa_lm_head.safetensors", "config.json"}
    lm_heads = check_heads(folder, tiny_spec()).tensors().lm_heads
    np.testing.assert_array_equal(lm_heads[1], medusa_v1(2)["1.1.weight"])
    assert (pickled.path / "medusa_lm_head.pt").exists()


def test_a_pickle_is_refused_without_the_operators_word(store, pickled, tmp_path):
    with pytest.raises(AdapterRejected, match=r"can run code.*--allow-pickle-heads"):
        Intake(store, tiny_spec(), None).take("h", pickled)
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_pickle_that_is_refused_leaves_no_trace(store, pickled, tmp_path):
    torch.save(torch.nn.Linear(8, 8), pickled.path / "medusa_lm_head.pt")
    with pytest.raises(AdapterRejected, match="which could run code"):
        Intake(store, tiny_spec(), None, allow_pickle_heads=True).take("h", pickled)
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_pickle_that_is_a_link_is_not_followed(store, pickled, tmp_path):
    pickle = pickled.path / "medusa_lm_head.pt"
    pickle.rename(tmp_path / "elsewhere")
    pickle.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterRejected, match="cannot be read"):
        Intake(store, tiny_spec(), None, allow_pickle_heads=True).take("h", pickled)


def test_safetensors_come_before_a_pickle(store, pickled):
    write_heads(pickled.path, medusa_v2(3))
    [arrival] = Intake(store, tiny_spec(), None, allow_pickle_heads=True).take("h", pickled)
    assert isinstance(arrival.content, HeadsInfo)
    assert arrival.content.num_heads == 3
