"""Servers to compare: started by their command line, waited for, stopped, held still meanwhile."""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglmoe.machine import has_accelerator

OURS = "sglmoe.launch_server"
UNMODIFIED = "sglang.launch_server"
START_SECONDS = 600.0
STOP_SECONDS = 30.0


class Server:
    """`python -m MODULE FLAGS --port ...` in a process group of its own, healthy once constructed.

    Raises RuntimeError with the end of its log if it does not start.
    """

    def __init__(self, module: str, flags: list[str]):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.command = [sys.executable, "-m", module, *machine_flags(module), *flags]
        self.command.append(f"--port={port}")
        self.log = Path(tempfile.mkdtemp(prefix="sglmoe-eval-")) / f"{module}.log"
        started = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._watchdog = kill_when_we_are_gone(self._process.pid)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """The launcher's, and the number of the process group that all of the server's processes are in."""
        return self._process.pid

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(0.3)
        tail = self.log.read_text()[-3000:]
        raise RuntimeError(f"{' '.join(self.command)} did not start:\n{tail}")

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer to a JSON request. Raises RuntimeError with the server's words for an error."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:500]}") from error
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text.decode()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.loads(response.read())

    def state(self) -> dict[str, Any]:
        """What our server says of its memory: `memory` (counters, frames) and `limits`."""
        return dict(self.get("/server_info")["internal_states"][0]["sglmoe"])

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Give it no CPU for a while: the unmodified scheduler polls while idle."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside `stopped`: let it run for a while."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """To all its processes: children of its fork server stay in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it and all its processes; at once if interrupted meanwhile."""
        try:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._watchdog.kill()
            self._watchdog.communicate()


@contextmanager
def running(module: str, *flags: str) -> Iterator[Server]:
    """A server that is stopped however this ends: SIGTERM and SIGHUP act as Ctrl-C from here on."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    server = Server(module, list(flags))
    try:
        yield server
    finally:
        server.stop()


def kill_when_we_are_gone(group: int) -> subprocess.Popen[bytes]:
    """Kill a process group, stopped ones too, when this process has ended and could not do it itself.

    Whatever ends us closes the pipe from which the watchdog reads.
    """
    command = ["sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(group)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def machine_flags(module: str) -> list[str]:
    """What the unmodified server must be told where there is no accelerator; other flags go before."""
    if has_accelerator() or module != UNMODIFIED:
        return []
    return ["--device=cpu", "--max-total-tokens=32768"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_run() -> dict[str, Any]:
    """Machine, versions, commit and command: what every result file begins with."""
    import torch

    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], text=True
        ).strip(),
        "command": " ".join(["python", "-m", module_name(), *sys.argv[1:]]).replace(
            str(Path.home()), "~"
        ),
    }


def module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]


def cpu_name() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()
