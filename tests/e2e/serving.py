"""Real HTTP servers, ours and the unmodified one, started by their own command lines in a fork.

`forking` says why forks. The command line is the one a user types: `python -m MODULE FLAGS`.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
from forking import share_fork_server

from sglmoe.start_up import die_with_parent

START_SECONDS = 240.0
STOP_SECONDS = 30.0


class Server:
    """A running server. `poll` is as `subprocess.Popen.poll`, for SGLang's kits."""

    def __init__(self, process: BaseProcess, url: str, log: Path):
        self.process = process
        self.url = url
        self.log = log

    def poll(self) -> int | None:
        return self.process.exitcode


class Outcome(NamedTuple):
    """How a command ended by itself, and what it said."""

    exitcode: int | None
    log: str


@contextmanager
def running_server(
    module: str,
    *flags: str,
    log: Path,
    environ: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """`python -m MODULE FLAGS --port ...`, healthy; stopped by SIGTERM in the end.

    `prepare` is called in its process, before the command.
    """
    port = free_port()
    process = start(module, *flags, f"--port={port}", log=log, environ=environ, prepare=prepare)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        stop(process)


def run_to_end(module: str, *flags: str, log: Path) -> Outcome:
    """The same command where it is expected to refuse to start."""
    process = start(module, *flags, f"--port={free_port()}", log=log)
    process.join(START_SECONDS)
    exitcode = process.exitcode
    stop(process)
    return Outcome(exitcode, log.read_text())


def run_as_a_user(*command: str, log: Path) -> Outcome:
    """A command in processes of its own, with no fork of ours.

    Raises AssertionError with the stack of every thread of every process if it does not end.
    """
    environ = os.environ | {"PYTHONFAULTHANDLER": "1"}
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=file, env=environ)
    try:
        process.wait(START_SECONDS)
    except psutil.TimeoutExpired:
        for one in [process, *process.children(recursive=True)]:
            one.send_signal(signal.SIGABRT)
            time.sleep(0.5)  # so that they write one after the other
        raise AssertionError(f"{command} did not end:\n{log.read_text()[-30000:]}") from None
    return Outcome(process.returncode, log.read_text())


def start(
    module: str,
    *flags: str,
    log: Path,
    environ: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(
        target=command, args=(module, flags, log, environ or {}, prepare)
    )
    process.start()
    return process


def command(
    module: str,
    flags: tuple[str, ...],
    log: Path,
    environ: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    """What `python -m` does, with output into a file."""
    die_with_parent()
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The test runner has put objects of its own in their place.
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(environ)
    share_fork_server()
    if prepare is not None:
        prepare()
    sys.argv = [module, *flags]
    try:
        run_module(module)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # Not the orderly end of a multiprocessing child, which waits for children that are killed.
    os._exit(status)


def run_module(module: str) -> None:
    if module == "sglmoe.launch_server":
        from sglmoe.launch_server import main

        main()
    else:
        from sglang.launch_server import run_server
        from sglang.srt.server_args import prepare_server_args

        run_server(prepare_server_args(sys.argv[1:]))


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.url}/health", timeout=10).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")


def stop(process: BaseProcess) -> None:
    """End the command and whatever it leaves behind: it leads their process group."""
    assert process.pid is not None
    process.terminate()
    process.join(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
