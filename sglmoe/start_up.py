"""Fast process starts: one fork server imports sglang while the launcher does, and every child is forked from it ready.

Importing sglang takes 10 to 25 CPU seconds a process, and sglang spawns its children one after the launcher. Where there
may be an accelerator we spawn as sglang does: importing it there can touch the driver, which does not survive a fork.

Contract with the children: they see the environment of the process that started them, not the fork server's, they can
set their title, and they die with it. Knows of sglang one name, the function that sets the start method.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any, NoReturn, ParamSpec

import setproctitle

from sglmoe.machine import has_accelerator

P = ParamSpec("P")

PRELOAD_MODULE = "sglmoe.preload"


def start_method() -> str:
    """How this machine starts children: multiprocessing's name for it."""
    return "spawn" if has_accelerator() else "forkserver"


def start_importing() -> None:
    """Start the fork server, which imports by itself. To be called before importing sglang; returns at once."""
    if start_method() != "forkserver" or is_child():
        return
    multiprocessing.set_forkserver_preload([PRELOAD_MODULE])
    forkserver.ensure_running()


def is_child() -> bool:
    """Also while a child runs the program's main module again, before it is told of its parent."""
    main_is_imported = getattr(multiprocessing.current_process(), "_inheriting", False)
    return main_is_imported or multiprocessing.parent_process() is not None


def keep_start_method() -> None:
    """Make sglang start its processes our way: it forces "spawn" as the last thing it does to the environment."""
    from sglang.srt.entrypoints import engine

    set_envs_and_config = engine._set_envs_and_config
    if isinstance(set_envs_and_config, _OurStartMethod):
        return
    engine._set_envs_and_config = _OurStartMethod(set_envs_and_config)


class _OurStartMethod:
    def __init__(self, set_envs_and_config: Callable[[Any], None]):
        self._set_envs_and_config = set_envs_and_config

    def __call__(self, server_args: Any) -> None:
        self._set_envs_and_config(server_args)
        multiprocessing.set_start_method(start_method(), force=True)


class ChildEntry:
    """A process target by name, imported only in the child. Extra keyword arguments are passed on to it.

    May be handed through several processes: each pickling takes the environment of the process that starts the next.
    """

    def __init__(self, module: str, function: str, **keywords: Any):
        self._module = module
        self._function = function
        self._keywords = keywords
        self._environ: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environ": dict(os.environ)}

    def __call__(self, *args: Any, **keywords: Any) -> None:
        setproctitle.getproctitle()  # finds the title's place, by the environment's, which is about to move
        restore_environment(self._environ)
        die_with_parent()
        reuse_fork_server()
        function = getattr(importlib.import_module(self._module), self._function)
        function(*args, **self._keywords, **keywords)


def restore_environment(environ: dict[str, str]) -> None:
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)


def die_with_parent() -> None:
    """Be killed when the process that started this one is gone.

    The kernel's parent-death signal would wait for the fork server, which lives on while any child does.
    Its own children go first: they would do the same by themselves, but not where they are stopped (SIGSTOP).
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process has a parent to die with"

    def wait() -> None:
        parent.join()
        try:
            for child in multiprocessing.active_children():
                child.kill()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()


def leave_after(function: Callable[P, None], *args: P.args, **keywords: P.kwargs) -> NoReturn:
    """End the process as `function` ends, with its exit status and message, but at once.

    The interpreter's orderly end waits for threads, for children that a kill has missed and that wait
    for us, and for the destructors of a dozen native libraries: any of these for ever.
    """
    status: int | str | None = 0
    try:
        function(*args, **keywords)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def reuse_fork_server() -> None:
    """Let a child of the fork server start processes through it too.

    Python (3.11 to 3.14) hands the address down for this, and then starts another server, without the imports.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_address is not None and server._forkserver_pid is None:
        server.ensure_running = lambda: None
