"""How a worker starts, and what is said of one that is gone."""

import multiprocessing
from unittest.mock import MagicMock

import pytest

from sglmoe import start_up
from sglmoe.scheduler.worker_client import WorkerProcess, describe_exit


@pytest.mark.parametrize(("has_accelerator", "method"), [(True, "spawn"), (False, "forkserver")])
def test_a_worker_is_no_fork_of_anything_where_there_may_be_an_accelerator(
    has_accelerator: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12.9 and later have a fork server import the main file, which may import SGLang, and that starts CUDA."""
    get_context = MagicMock()
    monkeypatch.setattr(start_up, "has_accelerator", lambda: has_accelerator)
    monkeypatch.setattr(multiprocessing, "get_context", get_context)
    worker = WorkerProcess.start(
        lambda *_: None, server_args=None, config=None, gpu_id=0, nccl_port=0
    )
    worker.remove_directory()
    get_context.assert_called_once_with(method)


@pytest.mark.parametrize(
    ("exitcode", "says"),
    [
        (-9, "killed by SIGKILL, probably out of memory; lower --memory-budget"),
        (-11, "killed by SIGSEGV"),
        (1, "exited with status 1"),
        (0, "exited with status 0"),
    ],
)
def test_an_exit_code_is_explained(exitcode: int, says: str) -> None:
    assert says in describe_exit(exitcode)
