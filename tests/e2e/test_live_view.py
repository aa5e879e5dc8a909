"""The live view of a real server: its page, its state, and what both say when workers are killed."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
from chromium import CHROMIUM, Tab, open_tab
from forking import run_in_fork
from serving import Server, running_server

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.live_view import state as schema
from sglmoe.live_view.state import LiveState

pytestmark = pytest.mark.usefixtures("preloaded")

KEY = "a-secret"
NUM_LAYERS, NUM_EXPERTS = 6, 32
PAGE_FILE = Path(schema.__file__).with_name("page.html")
DEADLINE_SECONDS = 60.0
WATCHDOG_SECONDS = 8
FLAGS = (
    f"--model-path={DEMO_MODEL}",
    "--memory-budget=8MB",
    "--max-running-requests=8",
    f"--watchdog-timeout={WATCHDOG_SECONDS}",
    "--shutdown-timeout=1",
)
HEADERS = {"Authorization": f"Bearer {KEY}"}


def look(server: Server) -> LiveState:
    response = requests.get(f"{server.url}/sglmoe/state", headers=HEADERS, timeout=60)
    assert response.status_code == 200, response.text
    return msgspec.json.decode(response.content, type=LiveState)


def look_until(server: Server, is_seen: Callable[[LiveState], bool]) -> LiveState:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_seen(state := look(server)):
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    return state


def server_info(server: Server) -> dict[str, Any]:
    info = requests.get(f"{server.url}/server_info", headers=HEADERS, timeout=60).json()
    return dict(info["internal_states"][0]["sglmoe"])


@contextmanager
def load(server: Server, num_clients: int = 4) -> Iterator[list[int]]:
    """So many clients that ask one thing after the other; the statuses of their answers."""
    over, statuses = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            body = {
                "text": "What is 17 + 25? " * 8,
                "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
            }
            answer = requests.post(
                f"{server.url}/generate", json=body, headers=HEADERS, timeout=120
            )
            statuses.append(answer.status_code)

    clients = [threading.Thread(target=ask) for _ in range(num_clients)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        over.set()
        for client in clients:
            client.join(DEADLINE_SECONDS)


# ------------------------------------------------------------------------------------------------------------ the state


def check_at_rest(server: Server) -> None:
    """Nothing changes, so it agrees with itself and with /server_info."""
    state, info = look(server), server_info(server)
    memory, drawn = state.memory, state.map
    assert drawn is not None
    frames, experts = Counter(drawn.frames), Counter("".join(drawn.residency))
    assert frames.total() == memory.num_frames
    assert (frames["e"], frames["k"] + frames["c"]) == (memory.expert_frames, memory.kv_frames)
    assert (frames["."], frames["k"], frames["l"]) == (memory.free_frames, 0, 0)
    assert experts["r"] == memory.expert_frames
    assert [len(row) for row in drawn.residency] == [NUM_EXPERTS] * NUM_LAYERS
    assert [len(row) for row in drawn.heat] == [NUM_EXPERTS] * NUM_LAYERS
    for field in ("num_frames", "expert_frames", "kv_frames", "free_frames", "cached_pages"):
        assert getattr(memory, field) == info["memory"][field]
    assert state.counters.expert_hits == info["memory"]["expert_hits"]
    assert state.worker.pid == info["worker_pid"]
    assert (state.requests.running, state.requests.queued) == (0, 0)


def check_under_load(server: Server) -> None:
    def has_rates(state: LiveState) -> bool:
        return bool(state.rates and state.rates.decode_tokens_per_second)

    state = look_until(server, has_rates)
    state = look_until(server, lambda state: has_rates(state) and state.requests.running > 0)
    assert state.rates is not None
    assert state.map is not None
    assert "k" in state.map.frames
    assert state.rates.hit_ratio is not None
    assert 0 < state.rates.hit_ratio <= 1
    assert 0 < state.rates.busy_ratio <= 1
    assert state.requests.running <= state.requests.running_limit == 8
    hottest = max(int(digit, 36) for row in state.map.heat for digit in row)
    assert hottest > 0
    assert state.map.heat_is == "share"


def check_a_death(server: Server) -> None:
    before = look(server)
    os.kill(before.worker.pid, signal.SIGKILL)
    lost = look_until(server, lambda state: state.worker.state == "restarting")
    assert lost.map is None
    assert "SIGKILL" in lost.worker.cause
    back = look_until(server, lambda state: state.worker.restarts == 1 and state.map is not None)
    assert back.worker.state == "running"
    assert back.worker.pid != before.worker.pid
    assert 0 < back.worker.restart_seconds < DEADLINE_SECONDS


def lose_patience() -> None:
    """What SGLANG_HEALTH_CHECK_TIMEOUT does, which was read when the session imported SGLang."""
    from sglang.srt.entrypoints import http_server

    http_server.HEALTH_CHECK_TIMEOUT = 3


def check_looking_is_no_health(server: Server) -> None:
    """A worker that is stopped with work to do serves nothing, whoever looks."""
    over = threading.Event()

    def stare() -> None:
        while not over.is_set():
            look(server)
            time.sleep(0.1)

    starer = threading.Thread(target=stare)
    starer.start()
    try:
        os.kill(look(server).worker.pid, signal.SIGSTOP)
        time.sleep(0.5)  # what was on its way arrives
        assert requests.get(f"{server.url}/health", timeout=60).status_code == 503
    finally:
        over.set()
        starer.join(DEADLINE_SECONDS)
    look_until(server, lambda state: state.worker.restarts == 2)


def watch(log: Path) -> None:
    flags = (*FLAGS, f"--api-key={KEY}")
    with running_server("sglmoe.launch_server", *flags, log=log, prepare=lose_patience) as server:
        for path in ("/sglmoe", "/sglmoe/state"):
            assert requests.get(server.url + path, timeout=60).status_code == 401
        page = requests.get(f"{server.url}/sglmoe", headers=HEADERS, timeout=60)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.text == PAGE_FILE.read_text()
        with load(server) as statuses:
            check_under_load(server)
        check_at_rest(server)
        with load(server) as statuses:
            check_under_load(server)
            check_a_death(server)
            check_under_load(server)
            check_looking_is_no_health(server)
        assert set(statuses) == {200}
        check_at_rest(server)
        assert log.read_text().count("GET /sglmoe/state") == 0, "an access log of nothing else"


def test_the_state_tells_what_the_server_does(tmp_path: Path) -> None:
    run_in_fork(watch, tmp_path / "log")


# ------------------------------------------------------------------------------------------------------------- the page

SHOWN = "document.body.innerText"


def wait_for_words(tab: Tab, *words: str) -> None:
    for word in words:
        tab.wait_for(f"{SHOWN}.includes({word!r})")


def check_fits(tab: Tab, width: int) -> None:
    """Nothing is wider than the window, and both maps have drawn something."""
    assert tab.value("document.documentElement.scrollWidth") <= width
    for canvas in ("arena", "experts", "split", "speed"):
        pixels = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        assert tab.value(f"(c => {pixels}.some(x => x))(document.getElementById('{canvas}'))")


def look_with_chromium(log: Path, user_data: Path) -> None:
    with (
        running_server("sglmoe.launch_server", *FLAGS, log=log) as server,
        open_tab(user_data) as tab,
    ):
        for width, dark in ((1280, False), (360, True)):
            with load(server):
                tab.open(f"{server.url}/sglmoe", width=width, height=900, dark=dark)
                wait_for_words(tab, "worker running", "tok/s", "6 layers of 32", "running")
                tab.wait_for("state.rates && state.rates.decode_tokens_per_second > 0")
                check_fits(tab, width)
        os.kill(look(server).worker.pid, signal.SIGKILL)
        wait_for_words(tab, "Another one is starting", "1 restart; last took", "worker running")
        assert tab.value("document.getElementById('banner').hidden")
        assert tab.complaints == []
        server.process.terminate()
        server.process.join(DEADLINE_SECONDS)
        wait_for_words(tab, "Connection lost, trying again")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_shows_it_on_a_desktop_and_on_a_phone(tmp_path: Path) -> None:
    run_in_fork(look_with_chromium, tmp_path / "log", tmp_path / "chromium")


def open_from_a_file(log: Path, user_data: Path) -> None:
    """The way for a server with a key, which a browser does not send by itself."""
    flags = (*FLAGS, f"--api-key={KEY}")
    with (
        running_server("sglmoe.launch_server", *flags, log=log) as server,
        open_tab(user_data) as tab,
    ):
        address = f"file://{PAGE_FILE}#server={server.url}"
        tab.open(f"{address}&key={KEY}", width=1280, height=900)
        wait_for_words(tab, "worker running", "6 layers of 32")
        assert tab.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_from_a_file_sends_the_key(tmp_path: Path) -> None:
    run_in_fork(open_from_a_file, tmp_path / "log", tmp_path / "chromium")
