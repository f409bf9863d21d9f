"""TLS and mutual TLS on real sockets, both transports; what is wrong with the files is told before anybody listens."""

import asyncio
import datetime as dt
import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_server.api.tls import Tls, TlsFiles
from perseid_server.errors import InvalidRequest
from tests.server.stack import Stack, serving


@dataclass
class Files:
    """A server's certificate, its authority's, and a client's."""

    cert: Path
    key: Path
    ca: Path
    client: Path
    authority: trustme.CA


def issue(authority: trustme.CA, path: Path, **options) -> tuple[Path, Path]:
    """A certificate for this machine and its key, in two files."""
    made = authority.issue_cert("127.0.0.1", "localhost", **options)
    cert, key = path.with_suffix(".pem"), path.with_suffix(".key")
    made.cert_chain_pems[0].write_to_path(cert)
    made.private_key_pem.write_to_path(key)
    return cert, key


@pytest.fixture
def files(tmp_path: Path) -> Files:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    cert, key = issue(authority, tmp_path / "server")
    authority.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    return Files(cert, key, tmp_path / "ca.pem", tmp_path / "client.pem", authority)


def context(files: Files, *, client: bool = False) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=files.ca)
    if client:
        made.load_cert_chain(files.client)
    return made


async def get(url: str, verify: ssl.SSLContext | bool = True) -> int:
    async with httpx.AsyncClient(verify=verify, timeout=20) as client:
        return (await client.get(f"{url}/health")).status_code


async def check(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    make = grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, credentials)
    async with make as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def secure(files: Files, *, client: bool = False) -> grpc.ChannelCredentials:
    pem = files.client.read_bytes() if client else None
    return grpc.ssl_channel_credentials(files.ca.read_bytes(), pem, pem)


async def test_both_transports_are_encrypted(stack: Stack, files: Files) -> None:
    async with serving(stack, Tls(TlsFiles(files.cert, files.key))) as live:
        url = live.url.replace("http:", "https:")
        assert await get(url, context(files)) == 200
        assert await check(live.grpc, secure(files)) is grpc.StatusCode.OK
        with pytest.raises(httpx.ConnectError):
            await get(url)  # an authority that is not known
        assert await check(live.grpc, grpc.ssl_channel_credentials()) is grpc.StatusCode.UNAVAILABLE


async def test_plain_clients_get_an_end(stack: Stack, files: Files) -> None:
    async with serving(stack, Tls(TlsFiles(files.cert, files.key))) as live:
        with pytest.raises(httpx.RemoteProtocolError):
            await get(live.url)
        assert await check(live.grpc, None) is grpc.StatusCode.UNAVAILABLE


async def test_old_versions_of_tls_are_refused(stack: Stack, files: Files) -> None:
    old = context(files)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with serving(stack, Tls(TlsFiles(files.cert, files.key))) as live:
        for port in (live.addresses.http_port, live.addresses.grpc_port):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=old)


async def test_with_mutual_tls_clients_need_a_certificate(stack: Stack, files: Files) -> None:
    async with serving(stack, Tls(TlsFiles(files.cert, files.key, files.ca))) as live:
        url = live.url.replace("http:", "https:")
        assert await get(url, context(files, client=True)) == 200
        assert await check(live.grpc, secure(files, client=True)) is grpc.StatusCode.OK
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
            await get(url, context(files))
        assert await check(live.grpc, secure(files)) is grpc.StatusCode.UNAVAILABLE


async def test_a_new_certificate_is_taken_over(stack: Stack, files: Files, tmp_path: Path) -> None:
    tls = Tls(TlsFiles(files.cert, files.key))
    async with serving(stack, tls) as live:
        url = live.url.replace("http:", "https:")
        other = trustme.CA()
        issue(other, tmp_path / "server")
        other.cert_pem.write_to_path(files.ca)
        tls.refresh()
        assert await get(url, context(files)) == 200
        assert await check(live.grpc, secure(files)) is grpc.StatusCode.OK
        files.key.write_text("broken")
        tls.refresh()
        assert await get(url, context(files)) == 200
        assert await check(live.grpc, secure(files)) is grpc.StatusCode.OK


def expired(files: Files, tmp_path: Path) -> None:
    issue(files.authority, tmp_path / "server", not_after=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))


def another(files: Files, tmp_path: Path) -> None:
    issue(files.authority, tmp_path / "other")[1].rename(files.key)


BROKEN = {
    "missing": (lambda files, _: files.cert.unlink(), "--tls-cert", "No such file"),
    "missing key": (lambda files, _: files.key.unlink(), "--tls-key", "No such file"),
    "missing authority": (lambda files, _: files.ca.unlink(), "--tls-client-ca", "No such file"),
    "a folder": (lambda files, _: (files.cert.unlink(), files.cert.mkdir()), "--tls-cert", "Is a directory"),
    "not PEM": (lambda files, _: files.cert.write_bytes(b"\x30\x82"), "--tls-cert", "not PEM"),
    "key not PEM": (lambda files, _: files.key.write_text(""), "--tls-key", "not PEM"),
    "swapped": (lambda files, _: shutil.copy(files.cert, files.key), "--tls-key", "not PEM"),
    "cut": (lambda files, _: files.cert.write_text(files.cert.read_text()[:200]), "--tls-cert", "cannot be read"),
    "another's key": (another, "--tls-key", "does not belong"),
    "expired": (expired, "--tls-cert", "expired"),
    "authority empty": (lambda files, _: files.ca.write_text(""), "--tls-client-ca", "not PEM"),
    "authority not PEM": (lambda files, _: files.ca.write_text("x"), "--tls-client-ca", "not PEM"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_told_by_file(case: str, files: Files, tmp_path: Path) -> None:
    harm, option, told = BROKEN[case]
    harm(files, tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        Tls(TlsFiles(files.cert, files.key, files.ca))
    assert caught.value.message.startswith(f"{option} {tmp_path}")
    assert caught.value.field == option[2:].replace("-", "_")
    assert told in caught.value.message


def test_a_key_with_a_password_is_refused_without_asking_for_it(files: Files) -> None:
    from cryptography.hazmat.primitives import serialization as how  # noqa: PLC0415

    key = how.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(how.Encoding.PEM, how.PrivateFormat.PKCS8, how.BestAvailableEncryption(b"x"))
    )
    with pytest.raises(InvalidRequest, match="has a password"):
        Tls(TlsFiles(files.cert, files.key))


def test_one_half_is_not_enough(files: Files) -> None:
    with pytest.raises(InvalidRequest, match="--tls-key is missing"):
        TlsFiles.of(files.cert, None, None)
    with pytest.raises(InvalidRequest, match="--tls-cert is missing"):
        TlsFiles.of(None, None, files.ca)
