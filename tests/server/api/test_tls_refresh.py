"""A certificate is replaced whole or not at all, whenever the files change and whatever cannot be read."""

import errno
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from perseid_server.api import tls as module
from perseid_server.api.tls import Tls, TlsFiles
from tests.server.api.test_tls import Files, check, context, files, get, issue, secure  # noqa: F401  a fixture
from tests.server.stack import LiveStack, Stack, make_stack, serving


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return make_stack(tmp_path / "stack")


def replace(files: Files, *, key: trustme.CA | None = None) -> trustme.CA:  # noqa: F811
    """Another authority's certificate; `key`: of whose, where it is not its own."""
    authority = trustme.CA()
    issue(authority, files.cert.with_suffix(""))
    authority.cert_pem.write_to_path(files.ca)
    if key is not None:
        issue(key, files.cert.with_name("other"))[1].rename(files.key)
    return authority


async def shown(live: LiveStack, *authorities: trustme.CA) -> None:
    """Who trusts these is served over both transports, whether or not they name the server."""
    trust = ssl.create_default_context()
    for authority in authorities:
        authority.configure_trust(trust)
    for host in ("127.0.0.1", "localhost"):  # an address is not named in the handshake
        assert await get(f"https://{host}:{live.addresses.http_port}", trust) == 200
    roots = b"".join(authority.cert_pem.bytes() for authority in authorities)
    assert await check(live.grpc, grpc.ssl_channel_credentials(roots)) is grpc.StatusCode.OK


def meanwhile(patched: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Something happens once between the first look at the key and the next."""
    changes = [change]

    def read(option: str, path: Path, original=module._read) -> bytes:
        told = original(option, path)
        if option == "--tls-key" and changes:
            changes.pop()()
        return told

    patched.setattr(module, "_read", read)


def taken_at_the_next_look(tls: Tls, before: ssl.SSLContext) -> None:
    """What was not taken yet."""
    assert tls.context is before
    tls.refresh()
    assert tls.context is not before


async def test_files_that_change_after_they_were_checked_break_nothing(
    stack: Stack,
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    async with serving(stack, tls) as live:
        after, original = replace(files), module._check_handshake

        def checked(*arguments) -> None:
            original(*arguments)
            issue(files.authority, files.cert.with_name("other"))[1].rename(files.key)

        with monkeypatch.context() as patched:
            patched.setattr(module, "_check_handshake", checked)
            tls.refresh()
        await shown(live, files.authority, after)
        tls.refresh()
        await shown(live, files.authority, after)


async def test_both_transports_show_the_same_though_files_change_while_they_are_read(
    stack: Stack,
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    async with serving(stack, tls) as live:
        later: list[trustme.CA] = []

        replace(files)
        with monkeypatch.context() as patched:
            meanwhile(patched, lambda: later.append(replace(files)))
            tls.refresh()
        await shown(live, files.authority)
        tls.refresh()
        await shown(live, *later)


def test_a_renewed_certificate_of_the_same_authority_is_one_of_both_transports(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who trusts one of them trusts the other: no handshake tells them apart."""

    def renew() -> None:
        issue(files.authority, files.cert.with_suffix(""))
        files.cert.write_bytes(files.cert.read_bytes() + files.ca.read_bytes())

    renew()
    tls = Tls(TlsFiles(files.cert, files.key))
    before = tls.context
    renew()
    with monkeypatch.context() as patched:
        meanwhile(patched, renew)
        tls.refresh()
    taken_at_the_next_look(tls, before)


def test_a_key_that_is_gone_for_a_moment_while_it_is_read(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    before = tls.context
    replace(files)
    key = files.key.read_bytes()
    with monkeypatch.context() as patched:
        meanwhile(patched, files.key.unlink)
        tls.refresh()
    assert f"--tls-key {files.key}: No such file or directory" in caplog.text
    assert tls.context is before
    files.key.write_bytes(key)
    tls.refresh()
    assert tls.context is not before


async def test_with_mutual_tls_clients_need_a_certificate_after_a_change_too(stack: Stack, files: Files) -> None:  # noqa: F811
    tls = Tls(TlsFiles(files.cert, files.key, files.ca))
    async with serving(stack, tls) as live:
        replace(files)
        tls.refresh()
        for host in ("127.0.0.1", "localhost"):
            url = f"https://{host}:{live.addresses.http_port}"
            assert await get(url, context(files, client=True)) == 200
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
                await get(url, context(files))
        assert await check(live.grpc, secure(files, client=True)) is grpc.StatusCode.OK
        assert await check(live.grpc, secure(files)) is grpc.StatusCode.UNAVAILABLE


def test_the_authority_of_clients_is_read_at_the_start_only(files: Files) -> None:  # noqa: F811
    files.ca.write_bytes("# unsere Behörde\n".encode() + files.ca.read_bytes())
    tls = Tls(TlsFiles(files.cert, files.key, files.ca))
    before = tls.context
    replace(files)
    files.ca.unlink()
    tls.refresh()
    assert tls.context is not before
    assert tls.context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_for_a_moment_is_read_again(
    number: int,
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    before = tls.context
    replace(files)

    def fails(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        for _ in range(3):
            tls.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        f"--tls-cert {files.cert}: {os.strerror(number)}; the certificate stays as it was"
    ]
    taken_at_the_next_look(tls, before)


def test_files_that_are_wrong_are_read_and_told_once(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    replace(files, key=files.authority)
    tls.refresh()
    monkeypatch.setattr(module, "_read", lambda *_: pytest.fail("read again"))
    tls.refresh()
    [told] = caplog.records
    assert "does not belong to the certificate" in told.getMessage()


def test_a_new_certificate_is_told(files: Files, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    caplog.set_level("INFO")
    tls = Tls(TlsFiles(files.cert, files.key))
    tls.refresh()
    assert not caplog.records
    replace(files)
    tls.refresh()
    assert [record.getMessage() for record in caplog.records] == ["the TLS certificate has been read again"]
