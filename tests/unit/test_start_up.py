"""What a child process gets from the one that started it."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglmoe.start_up import ChildEntry, restore_environment


def test_an_entry_takes_the_environment_along_as_it_is_when_the_child_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = ChildEntry("os", "getpid")
    monkeypatch.setenv("SGLMOE_TEST", "set after the entry was made")
    state = pickle.loads(pickle.dumps(entry)).__dict__
    assert state["_environ"]["SGLMOE_TEST"] == "set after the entry was made"


def test_an_entry_within_an_entry_survives_both_trips() -> None:
    inner = ChildEntry("json", "dumps")
    outer = pickle.loads(pickle.dumps(ChildEntry("os", "getpid", run_worker=inner)))
    again = pickle.loads(pickle.dumps(outer._keywords["run_worker"]))
    assert (again._module, again._function) == ("json", "dumps")


def test_the_restored_environment_is_the_same_to_the_last_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = dict(os.environ) | {"SGLMOE_NEW": "1"}
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"SGLMOE_OLD": "1"})
    restore_environment(wanted)
    assert dict(os.environ) == wanted


TITLED = """
import multiprocessing, os
from pathlib import Path

import setproctitle

from sglmoe.start_up import ChildEntry

def show():
    setproctitle.setproctitle("sglmoe::test")
    print(Path("/proc/self/cmdline").read_text().rstrip(chr(0)), os.environ["SGLMOE_LATER"])

if __name__ == "__main__":
    os.environ["SGLMOE_LATER"] = "restored"
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=ChildEntry("titled", "show"))
    child.start()
    child.join()
"""


def test_a_child_whose_environment_was_restored_can_still_set_its_title(tmp_path: Path) -> None:
    """By it SGLang's launcher, and people, know its processes."""
    (tmp_path / "titled.py").write_text(TITLED)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "titled.py")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout == "sglmoe::test restored\n", run.stderr


STUBBORN = """
import multiprocessing, sys, threading, time
from sglmoe.start_up import ChildEntry, leave_after

def end_badly():
    context = multiprocessing.get_context("forkserver")
    context.Process(target=ChildEntry("time", "sleep"), args=(3600,)).start()
    threading.Thread(target=time.sleep, args=(3600,)).start()
    {ending}

if __name__ == "__main__":
    leave_after(end_badly)
"""


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no such flag')", 1, "no such flag\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_nothing_holds_a_process_that_leaves(ending: str, status: int, words: str) -> None:
    # The pipes end when the last process that holds them has ended: parent, fork server and child.
    command = [sys.executable, "-c", STUBBORN.format(ending=ending)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == status
    assert outcome.stderr.endswith(words)


STOPPED = """
import multiprocessing, os, signal, time
from sglmoe.start_up import ChildEntry

def start_and_wait():
    child = multiprocessing.get_context("forkserver").Process(
        target=ChildEntry("time", "sleep"), args=(3600,)
    )
    child.start()
    time.sleep(0.5)  # it is through with its start
    os.kill(child.pid, signal.SIGSTOP)
    print(child.pid, flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.Process(target=ChildEntry("stopped", "start_and_wait")).start()
    time.sleep(3600)
"""


def test_a_stopped_child_of_a_child_does_not_outlive_the_process_either(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    command = [sys.executable, str(tmp_path / "stopped.py")]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            grandchild = psutil.Process(int(process.stdout.readline()))
            while grandchild.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
        finally:
            process.kill()
        grandchild.wait(20)


OFFLINE = """
import multiprocessing
from sglmoe import start_up

start_up.PRELOAD_MODULE = "json"  # for all that sglang's processes import
start_up.start_importing()

if __name__ == "__main__":
    child = multiprocessing.get_context("forkserver").Process(target=print, args=("from the child",))
    child.start()
    child.join()
    print("status", child.exitcode)
"""


def test_a_child_that_runs_the_users_script_again_starts_nothing(tmp_path: Path) -> None:
    """`from sglmoe import Engine` at the top of a script: it is run once more in each child."""
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout == "from the child\nstatus 0\n", run.stderr
