"""Who may listen where without keys."""

import socket

import pytest

from perseid_server.access.exposure import check_exposure, is_loopback
from perseid_server.errors import InvalidRequest


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, has_keys=False, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "203.0.113.1", "0", "::ffff:10.0.0.1", "2001:db8::1"])
def test_anything_else_does_and_the_ways_out_are_told(host: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_exposure(host, has_keys=False, insecure=False)
    assert all(way in caught.value.message for way in ("--api-keys", "--insecure-listen", "127.0.0.1"))
    check_exposure(host, has_keys=True, insecure=False)
    check_exposure(host, has_keys=False, insecure=True)


def test_a_name_is_what_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert not is_loopback("both.example")


def test_a_name_that_stands_for_nothing_is_told() -> None:
    with pytest.raises(InvalidRequest, match=r"--host 'no such\.invalid'"):
        check_exposure("no such.invalid", has_keys=False, insecure=False)
