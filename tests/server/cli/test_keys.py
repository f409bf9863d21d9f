"""`perseid keys`, the loopback rule, and clients that show a key over TLS."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from perseid_server.access.key_file import read_keys
from perseid_server.access.keys import hash_text
from perseid_server.api.tls import Tls, TlsFiles
from tests.server.access.rings import gate_of, key
from tests.server.cli.running import Perseid
from tests.server.stack import make_stack, serving


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """A server with TLS and the key `user`, on a loop of its own; its gRPC address."""
    started: Future[tuple[str, asyncio.Event]] = Future()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        stopping = asyncio.Event()
        tls = Tls(TlsFiles(folder / "both.pem", folder / "both.pem"))
        async with serving(make_stack(folder, gate=gate_of(key("user"))), tls) as live:
            started.set_result((live.grpc, stopping))
            await stopping.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    address, stopping = started.result(30)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


def test_a_key_is_shown_once_listed_and_revoked(perseid: Perseid, tmp_path: Path) -> None:
    path = str(tmp_path / "keys.toml")
    made = perseid("keys", "new", "web", "--api-keys", path, "--adapters", "acme-*", "--tokens-per-day", "5",
                   "--expires", "2099-12-31", "--role", "generate", "--role", "admin")  # fmt: skip
    assert made.status == 0
    [secret] = made.out.split()
    found = read_keys(Path(path)).find(secret)
    assert found is not None
    assert (found.caller.roles, found.caller.adapters) == ({"generate", "admin"}, ("acme-*",))
    listed = perseid("keys", "list", "--api-keys", path)
    assert all(told in listed.out for told in ("web", "acme-*", "5 tokens/day", "until 2100-01-01"))
    assert secret not in listed.out + Path(path).read_text()
    again = perseid("keys", "new", "web", "--api-keys", path)
    assert (again.status, again.out) == (1, "")
    assert "revoke it first" in again.err
    assert perseid("keys", "revoke", "web", "--api-keys", path).status == 0
    assert read_keys(Path(path)).keys == {}
    assert perseid("keys", "revoke", "web", "--api-keys", path).err == f"perseid: {path} has no key 'web'\n"


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ("2099-12-31T22:30:00-05:00", "until 2100-01-01 03:30 UTC"),
        ("2099-12-31T22:30:00", "until 2099-12-31 22:30 UTC"),
        ("9999-12-31T23:59:59-05:00", "until 9999-12-31 00:00 UTC"),  # beyond what UTC can tell
        ("0001-01-01T00:00:00+05:00", "expired"),
    ],
)
def test_the_end_of_a_key_is_told_in_utc(stated: str, told: str, perseid: Perseid, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.a]\nhash = "{hash_text("a")}"\nexpires = {stated}\n')
    assert told in perseid("keys", "list", "--api-keys", str(path)).out


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_serve_does_not_open_to_strangers(perseid: Perseid, host: str) -> None:
    done = perseid("serve", "--host", host)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "--insecure-listen" in done.err


def test_what_is_wrong_with_keys_and_certificates_is_told_first(perseid: Perseid, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("[keys.a]\nroles = 1")
    assert "keys.toml, line 1: keys.a.hash" in perseid("serve", "--api-keys", str(tmp_path / "keys.toml")).err
    done = perseid("serve", "--tls-cert", str(tmp_path / "no.pem"), "--tls-key", str(tmp_path / "no.key"))
    assert done.err == f"perseid: --tls-cert {tmp_path}/no.pem: No such file or directory\n"


def test_clients_show_their_key_over_tls(perseid: Perseid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    made = authority.issue_cert("127.0.0.1")
    made.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    with _served(tmp_path) as address:
        common = ("generate", "hi", "--max-tokens", "2", "--server", address)
        trusting = (*common, "--tls-ca", str(tmp_path / "ca.pem"))
        assert perseid(*trusting).err.startswith("perseid: UNAUTHENTICATED")
        assert perseid(*trusting, "--api-key", "user").status == 0
        monkeypatch.setenv("PERSEID_API_KEY", "user")
        assert perseid(*trusting).status == 0
        listed = perseid("adapters", "list", "--server", address, "--tls-ca", str(tmp_path / "ca.pem"))
        assert listed.err.startswith("perseid: PERMISSION_DENIED")
        assert perseid(*common).err.startswith(f"perseid: {address}: ")
        assert "printable ASCII" in perseid(*trusting, "--api-key", "ü").err
