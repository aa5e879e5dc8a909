"""One import of SGLang for a whole test session: every engine, server or computation is a fork.

Importing SGLang costs 25 CPU seconds, and its globals allow one engine per process. So the session
imports it once (`preload`) and forks (`run_in_fork`). The rule that keeps forks safe: the session's
own process only imports. It never computes with torch, whose threads a fork would not have.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from sglmoe.start_up import reuse_fork_server, start_importing

P = ParamSpec("P")
R = TypeVar("R")

PRELOADED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
TIMEOUT_SECONDS = 300.0


def preload() -> None:
    """Import what SGLang's processes import, and let engines of forks fork, not spawn, theirs.

    Our own engine goes on to start its processes through a fork server; the session has one.
    """
    start_importing()
    for name in PRELOADED:
        importlib.import_module(name)
    from sglang.srt.entrypoints import engine

    set_environment = engine._set_envs_and_config

    def set_environment_and_fork(server_args: Any) -> None:
        set_environment(server_args)
        multiprocessing.set_start_method("fork", force=True)

    engine._set_envs_and_config = set_environment_and_fork


def run_in_fork(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `function` returns in a fork of this process; the result has to pickle.

    Raises AssertionError with the child's traceback, or after `TIMEOUT_SECONDS`.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(theirs, function, args, kwargs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_SECONDS):
            raise AssertionError(f"{function} did not return in {TIMEOUT_SECONDS:.0f} s")
        succeeded, result = ours.recv()
    except EOFError:
        raise AssertionError(f"{function} took its process down with it") from None
    finally:
        _end(child)
    assert succeeded, result
    return result


def _run(
    results: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    os.setsid()
    share_fork_server()
    try:
        results.send((True, function(*args, **kwargs)))
    except BaseException:
        results.send((False, traceback.format_exc()))
    # Not the orderly end of a multiprocessing child: it waits for our engine's processes, which are the session's fork
    # server's children, so that no shutdown finds them, and which die with this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share_fork_server() -> None:
    """Use the session's fork server in a fork, which is not its parent and must not wait for it."""
    forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]
    reuse_fork_server()


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """End the child and all that it started: it leads their process group."""
    child.join(timeout=5)
    if child.pid is not None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            child.join()
