"""What a child process gets from the one that started it."""

import os
import pickle
import subprocess
import sys

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


FORGETFUL = """
import multiprocessing
from sglmoe.start_up import ChildEntry, forget_children

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=ChildEntry("time", "sleep"), args=(3600,))
    child.start()
    print(child.pid, flush=True)
    forget_children()
"""


def test_a_forgotten_child_does_not_hold_its_parent_and_dies_with_it() -> None:
    # The pipe ends when the last process that holds it has ended: parent, fork server and child.
    command = [sys.executable, "-c", FORGETFUL]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert outcome.stdout.strip().isdigit(), outcome.stderr
