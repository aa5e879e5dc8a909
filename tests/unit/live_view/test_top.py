"""`python -m sglmoe.top` against a server that answers what the test says."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console
from states import STATE

from sglmoe import top
from sglmoe.top import NoAnswer, ask_again, asking


class Server(HTTPServer):
    """Answers with `status` and `body`; wants `key`, if there is one."""

    status = 200
    body = msgspec.json.encode(STATE)
    key = ""
    num_asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.num_asked += 1
        refused = server.key and self.headers.get("Authorization") != f"Bearer {server.key}"
        status = 401 if refused else server.status if self.path == "/sglmoe/state" else 404
        self.send_response(status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(top, "ONCE_SECONDS", 0.0)
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["top", *argv])
    top.main()


def test_once_asks_twice_and_prints_one_picture(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--once", "--url", server.url + "/")
    printed = capsys.readouterr().out
    assert server.num_asked == 2, "rates are taken between two questions"
    assert printed.count("worker running") == 1
    assert "123.4 tok/s" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "secret"}, "--api-key"),
        ({"status": 404}, "no live view"),
        ({"status": 503, "body": b"the scheduler does not answer"}, "503, the scheduler does not"),
        ({"body": b'{"model": "older"}'}, "another version"),
        ({"body": b"<html>"}, "another version"),
    ],
)
def test_a_wrong_answer_ends_it_with_what_to_change(
    server: Server, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--once", "--url", server.url)


def test_the_key_is_sent(server: Server) -> None:
    server.key = "secret"
    assert asking(server.url, "secret")() == STATE


def test_no_server_and_no_url_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no server answers at http://127.0.0.1:1 .*--url"):
        run(monkeypatch, "--once", "--url", "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match="not a URL"):
        run(monkeypatch, "--url", "localhost:30000")


def test_a_server_that_goes_away_is_waited_for(server: Server) -> None:
    ask = asking(server.url, None)
    server.status = 503
    state, lost = ask_again(ask, STATE)
    assert state is STATE
    assert lost.startswith("connection lost, trying again")
    server.status, server.body = 200, msgspec.json.encode(replace(STATE, model="other"))
    assert ask_again(ask, STATE) == (replace(STATE, model="other"), "")


def test_it_shows_on_until_it_is_interrupted(server: Server) -> None:
    """And what it shows follows the server."""
    states = [replace(STATE, model="first"), replace(STATE, model="second")]

    def ask() -> Any:
        if not states:
            raise KeyboardInterrupt
        return states.pop(0)

    console = Console(width=100, force_terminal=False, record=True)
    with pytest.raises(KeyboardInterrupt):
        top.show_on(ask, console, 0.0)
    assert "second" in console.export_text()


def test_what_is_no_answer_says_so() -> None:
    with pytest.raises(NoAnswer, match="not a URL"):
        asking("nonsense", None)
