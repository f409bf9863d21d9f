"""What the hub brings, to whom, how much of it, and what is told when it brings nothing. The real huggingface_hub over
a hub that is none."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from perseid_server.adapters import sizes
from perseid_server.adapters.hub import HubAccess, HubId, download
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.source import OPERATOR, SourcePolicy, from_hub
from perseid_server.errors import AdapterRejected, InvalidRequest, NotFound, PerseidError, TooLarge, Unavailable
from tests.fake_hub import TOKEN, FakeHub, fake_hub, http_error
from tests.server.adapters.folders import write_adapter

OPEN, PRIVATE = HubId("org/open", None), HubId("org/private", None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as hub:
        hub.add("org/open", write_adapter(tmp_path / "open"))
        hub.add("org/private", write_adapter(tmp_path / "private"), private=True)
        yield hub


@pytest.fixture
def apart(tmp_path: Path) -> HubAccess:
    """For somebody who sees only a part."""
    folder = tmp_path / "apart"
    folder.mkdir()
    return HubAccess(cache=folder)


def refused(at: HubId, access: HubAccess, kind: type[PerseidError]) -> PerseidError:
    with pytest.raises(PerseidError) as caught:
        download(at, access)
    assert type(caught.value) is kind, caught.value
    return caught.value


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- whose cache ----------------------------------------------------------------------------------------------------


def test_the_operators_token_opens_what_is_private(hub):
    assert names(download(PRIVATE, HubAccess())) == {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize("by_commit", [False, True], ids=["branch", "commit"])
@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
def test_the_operators_cache_opens_nothing_for_those_who_see_only_a_part(is_up, by_commit, hub, apart, tmp_path):
    download(PRIVATE, HubAccess())
    assert list((tmp_path / "cache").rglob(WEIGHTS_FILE)), "not in the cache: the test proves nothing"
    commit = hub.repositories["org/private"].commit
    if not is_up:
        hub.before = fail_with(http_error("ConnectError"))
    at = HubId("org/private", commit) if by_commit else PRIVATE
    there = refused(at, apart, NotFound if is_up else Unavailable).message
    missing = refused(HubId("org/missing", at.revision), apart, NotFound if is_up else Unavailable).message
    assert there.replace("private", "missing") == missing, "a refusal tells what is cached"
    assert list(apart.cache.iterdir()) == []


def test_what_is_everybodys_comes_without_the_token_and_stays_apart(hub, apart, tmp_path):
    folder = download(OPEN, apart)
    assert names(folder) == {CONFIG_FILE, WEIGHTS_FILE}
    assert folder.is_relative_to(apart.cache)
    assert not (tmp_path / "cache").exists()


def test_what_was_everybodys_is_not_served_when_it_is_private(hub, apart):
    download(OPEN, HubAccess())
    hub.repositories["org/open"].private = True
    refused(OPEN, apart, NotFound)


def test_the_operators_cache_cannot_be_taken_by_mistake(hub):
    with pytest.raises(ValueError, match="operator's cache"):
        from_hub(OPEN, SourcePolicy(allow_hub=True, sees=lambda _: True))


# --- the operator's cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["ConnectError", "ReadError", "RemoteProtocolError"])
def test_the_operator_is_served_from_the_cache_while_the_hub_is_away(trouble, hub):
    before = download(OPEN, HubAccess())
    hub.before = fail_with(http_error(trouble))
    assert download(OPEN, HubAccess()) == before


def test_a_repository_that_changes_meanwhile_is_not_mixed(hub, tmp_path):
    def change(asked: str) -> None:
        if asked.startswith("GET") and asked.endswith(CONFIG_FILE):
            hub.add("org/open", write_adapter(tmp_path / "changed", seed=9))

    hub.before = change
    assert "changed while it was downloaded" in refused(OPEN, HubAccess(), Unavailable).message


# --- how much -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["operator", "apart"])
@pytest.mark.parametrize(
    ("file", "limit"), [(WEIGHTS_FILE, "MAX_ADAPTER_BYTES"), (CONFIG_FILE, "MAX_CONFIG_BYTES")], ids=["tensors", "json"]
)
def test_what_is_too_large_is_refused_before_any_of_it_is_downloaded(file, limit, own, hub, apart):
    at_most = getattr(sizes, limit)
    hub.repositories["org/open"].stated = {file: at_most + 1}
    error = refused(OPEN, HubAccess() if own else apart, TooLarge)
    assert error.message == f"{file} has {at_most + 1} bytes; the limit is {at_most}"
    assert hub.downloaded == []


def test_what_is_not_wanted_may_be_large(hub):
    hub.repositories["org/open"].stated = {"model.safetensors": 1 << 50}
    assert names(download(OPEN, HubAccess())) == {CONFIG_FILE, WEIGHTS_FILE}


def test_a_size_that_is_not_told_is_refused(hub):
    hub.repositories["org/open"].stated = {WEIGHTS_FILE: None}
    assert f"how large {WEIGHTS_FILE} is" in refused(OPEN, HubAccess(), Unavailable).message
    assert hub.downloaded == []


def test_heads_in_a_models_files_are_measured_too(hub, tmp_path):
    config = {"model_type": "medusa", "medusa_num_heads": 3}
    hub.add("org/heads", heads_folder(tmp_path / "heads", config)).stated = {"model.safetensors": 9 << 30}
    assert "model.safetensors has" in refused(HubId("org/heads", None), HubAccess(), TooLarge).message
    assert hub.downloaded == ["config.json"]


def test_a_download_whose_time_is_over_ends(hub, apart):
    error = refused(OPEN, HubAccess(apart.cache, until=0.0), Unavailable)
    assert "TimeoutError" in error.message


def heads_folder(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "medusa_lm_head.pt"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("there", "pickles", "further"),
    [
        ({"config.json": {"model_type": "medusa"}}, False, {"model.safetensors"}),
        ({"config.json": {"medusa_num_heads": 3}}, True, {"model.safetensors", "medusa_lm_head.pt"}),
        ({"config.json": {"model_type": "medusa"}, "medusa_lm_head.safetensors": {}}, True, set()),
        ({"config.json": {"model_type": "llama"}}, True, set()),
        ({CONFIG_FILE: {}, "config.json": {"model_type": "medusa"}}, True, set()),
    ],
)
def test_the_hub_is_asked_for_a_models_files_only_when_they_are_heads(there, pickles, further, hub, tmp_path):
    folder = heads_folder(tmp_path / "heads", {})
    for name, content in there.items():
        (folder / name).write_text(json.dumps(content))
    hub.add("org/heads", folder)
    found = download(HubId("org/heads", None), HubAccess(allow_pickle_heads=pickles))
    assert names(found) == set(hub.downloaded) == set(there) | further


def test_a_repository_without_any_of_the_files_is_refused(hub, tmp_path):
    shutil.copytree(tmp_path / "open", tmp_path / "empty", ignore=lambda *_: [CONFIG_FILE, WEIGHTS_FILE])
    hub.add("org/empty", tmp_path / "empty")
    assert CONFIG_FILE in refused(HubId("org/empty", None), HubAccess(), AdapterRejected).message


# --- what is told ---------------------------------------------------------------------------------------------------


def fail_with(error: Exception) -> Callable[[str], None]:
    def fail(_: str) -> None:
        raise error

    return fail


def test_unknown_repositories_and_revisions(hub):
    refused(HubId("org/missing", None), HubAccess(), NotFound)
    assert "org/open@v9" in refused(HubId("org/open", "v9"), HubAccess(), NotFound).message


@pytest.mark.parametrize("name", ["org/na--me", "org/name.git", "org/na..me", "org/name-"])
def test_a_hub_id_that_the_hub_itself_does_not_allow_is_refused(name, hub):
    refused(HubId(name, None), HubAccess(), InvalidRequest)


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/home/operator/.cache/x")
REACHED, WRITTEN = "cannot be reached", "cannot be written: "
FAILURES: dict[str, tuple[Exception, type[PerseidError], str]] = {
    "gated": (errors.GatedRepoError("no", response=Mock()), NotFound, "does not show it"),
    "status": (errors.HfHubHTTPError("no", response=Mock(status_code=502)), Unavailable, "HTTP status 502"),
    "offline": (errors.OfflineModeIsEnabled("no"), Unavailable, REACHED),
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "no"), Unavailable, REACHED),
    "read": (http_error("ReadError"), Unavailable, "cannot be reached (ReadError)"),
    "broken off": (http_error("RemoteProtocolError"), Unavailable, REACHED),
    "proxy": (http_error("ProxyError"), Unavailable, REACHED),
    "xet": (errors.XetDownloadError("no"), Unavailable, REACHED),
    "not in the cache": (
        caused_by(errors.LocalEntryNotFoundError("no"), http_error("ConnectTimeout")), Unavailable, "(ConnectTimeout)"
    ),
    "anything": (RuntimeError(f"{TOKEN} at /home/operator"), Unavailable, REACHED),
    "full": (FULL, Unavailable, WRITTEN + "No space left on device"),
    "quota": (OSError(errno.EDQUOT, "no"), Unavailable, WRITTEN + "Disk quota exceeded"),
    "read-only": (OSError(errno.EROFS, "no"), Unavailable, WRITTEN + "Read-only file system"),
    "not allowed": (PermissionError(errno.EACCES, "no"), Unavailable, WRITTEN + "Permission denied"),
    "full below": (caused_by(errors.XetDownloadError("no"), FULL), Unavailable, WRITTEN + "No space left on device"),
    "full in Rust": (RuntimeError("IO Error: (os error 28) here"), Unavailable, WRITTEN + "No space left on device"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_each_failure_is_told_without_paths_addresses_and_tokens(case, hub, monkeypatch):
    failure, kind, words = FAILURES[case]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=failure))
    message = refused(OPEN, HubAccess(), kind).message
    assert message.startswith("source 'org/open': ")
    assert words in message
    assert not any(secret in message for secret in (TOKEN, "/home", "https:", "Signature"))


def test_the_operators_policy_uses_the_operators_cache(hub, tmp_path):
    assert from_hub(PRIVATE, OPERATOR).path.is_relative_to(tmp_path / "cache")
