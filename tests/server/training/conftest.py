"""The tiny base is written once."""

import pytest

from perseid_server.training.workbench import Workbench
from tests.server.training.benches import Folders, open_tiny, write_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The tiny base and its two adapters."""
    return write_folders(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def bench(folders: Folders) -> Workbench:
    """The same, on the device."""
    return open_tiny(folders)
