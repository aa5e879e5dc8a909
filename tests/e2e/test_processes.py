"""The server's processes end together, whichever of them is killed, and nothing stays behind."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from checkpoints import make_checkpoint
from forking import run_in_fork

START_SECONDS = 300
END_SECONDS = 30

pytestmark = pytest.mark.slow


class Server:
    """`python -m sglmoe.launch_server` as an operator starts it."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "sglmoe.launch_server", "--memory-budget", "200MB"]
        command += ["--model-path", str(model), "--port", str(port)]
        with log.open("wb") as output:
            self.launcher = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self._wait_until_ready()
        self.children: list[psutil.Process] = self.launcher.children(recursive=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "fired up" not in self.log:
            assert self.launcher.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def worker(self) -> psutil.Process:
        """The scheduler starts it last, and it holds the arena."""
        return max(self.children, key=lambda process: process.create_time())

    @property
    def scheduler(self) -> psutil.Process:
        """The first that the fork server is asked for."""
        return min(self.worker.parent().children(), key=lambda process: process.create_time())

    def survivors(self) -> list[psutil.Process]:
        """Processes that still run `END_SECONDS` later. A zombie does not: nobody has asked for its status."""
        deadline = time.monotonic() + END_SECONDS
        while running := [p for p in [self.launcher, *self.children] if is_running(p)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return running

    def kill(self) -> None:
        for process in [self.launcher, *self.children]:
            if is_running(process):
                process.kill()
        self.launcher.wait()


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    return run_in_fork(make_checkpoint, "qwen3_moe", tmp_path_factory.mktemp("processes"))


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(model, tmp_path / "log")
    yield server
    server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_launcher(server: Server, number: signal.Signals) -> None:
    """After SIGKILL it can clean up nothing itself."""
    assert len(server.children) >= 4  # fork server, scheduler, detokenizer, worker
    server.launcher.send_signal(number)
    assert server.survivors() == []


def test_a_killed_worker_is_replaced_and_a_killed_scheduler_ends_the_server(server: Server) -> None:
    server.worker.kill()
    deadline = time.monotonic() + START_SECONDS
    while "A new worker serves" not in server.log:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.1)
    assert "the worker was killed by SIGKILL" in server.log
    answer = requests.post(f"{server.url}/generate", json={"input_ids": [5, 6]}, timeout=60)
    assert answer.status_code == 200
    server.children = server.launcher.children(recursive=True)
    server.scheduler.kill()
    assert server.survivors() == []
    assert server.launcher.wait() != 0
    assert "Subprocess scheduler_0" in server.log
