"""What is said of a worker that is gone."""

import pytest

from sglmoe.scheduler.worker_client import describe_exit


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
