"""Who is let in, and with how much."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from running import Running, Scripted, running

from fourfold.errors import ConfigError
from fourfold.serving import Served, ServerOptions, open_socket


@pytest.fixture(scope="module")
def locked(tiny_served: Served) -> Iterator[Running]:
    served = Served(Scripted(tiny_served.engine), {"m": None})
    with running(served, api_keys=("first-key", "second-key"), max_body_bytes=2000, body_timeout=0.5) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer first-key2"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-Api-Key": "first-key"},
    ],
    ids=str,
)
def test_without_a_key_nothing_is_told(locked: Running, headers: Any) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        response = httpx2.get(locked.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "first-key" not in response.text
    assert httpx2.post(f"{locked.url}/v1/chat/completions", headers=headers, content=b"x" * 99).status_code == 401
    assert httpx2.get(f"{locked.url}/health").status_code == 200


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens(locked: Running, key: str) -> None:
    response = httpx2.get(f"{locked.url}/v1/models", headers={"authorization": f"bearer {key}"})
    assert [model["id"] for model in response.json()["data"]] == ["m"]


def test_keys_are_not_shown_with_the_options() -> None:
    assert "hidden" not in repr(ServerOptions(api_keys=("hidden",)))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(locked: Running, chunked: bool) -> None:
    content: Any = (b"a" * 500 for _ in range(5)) if chunked else b"a" * 2001
    response = httpx2.post(
        f"{locked.url}/v1/chat/completions", content=content, headers={"Authorization": "Bearer first-key"}
    )
    assert response.status_code == 413
    assert "2000 bytes" in response.json()["error"]["message"]


def test_a_body_that_is_told_to_be_long_is_refused_before_it_comes(locked: Running) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(20).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_waited_for_no_longer(locked: Running) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=5) as connection:
        began = time.monotonic()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert connection.recv(20).startswith(b"HTTP/1.1 408")
        assert 0.3 < time.monotonic() - began < 3


def test_a_page_of_another_site_that_points_its_name_here_is_refused(tiny_server: Running) -> None:
    for host, status in (
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("", 403),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
    ):
        response = httpx2.get(f"{tiny_server.url}/v1/models", headers={"Host": host})
        assert response.status_code == status, host


def test_a_page_of_another_site_cannot_ask_as_a_form_does(tiny_server: Running) -> None:
    """What a browser sends without asking first has another content type; and asked first, nothing is allowed."""
    body = b'{"model": "base", "prompt": "a", "max_tokens": 1}'
    url = f"{tiny_server.url}/v1/completions"
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = httpx2.post(url, content=body, headers={"Content-Type": content_type})
        assert response.status_code == 400, content_type
    asked = httpx2.options(url, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback_addresses_are_known(host: str, expected: bool) -> None:
    assert ServerOptions(host=host).is_loopback is expected


@pytest.mark.parametrize(
    "fields",
    [
        {"port": -1},
        {"max_tokens": 0},
        {"max_waiting": -1},
        {"max_body_bytes": 0},
        {"request_timeout": 0},
        {"request_timeout": float("nan")},
        {"api_keys": ("",)},
        {"api_keys": ("a b",)},
        {"api_keys": ("ключ",)},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerOptions(**fields)


def test_an_address_that_is_taken_or_not_ours_is_a_configuration_fault() -> None:
    with open_socket(ServerOptions(port=0)) as listener, pytest.raises(ConfigError, match="cannot listen"):
        open_socket(ServerOptions(port=listener.getsockname()[1]))
    with pytest.raises(ConfigError, match=r"cannot listen"):
        open_socket(ServerOptions(host="192.0.2.1", port=0))
