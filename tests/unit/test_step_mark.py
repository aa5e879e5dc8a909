"""What a worker marks, the scheduler still reads when the worker has been killed."""

import multiprocessing
import os
import signal

from sglmoe.step_mark import StepMark


def begin_and_die(mark: StepMark, step_id: int) -> None:
    mark.step_id = step_id
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_mark_outlives_the_process_that_made_it() -> None:
    mark = StepMark()
    assert mark.step_id == -1
    for step_id in (7, 1 << 40):  # workers come and go, each with a number of its own
        # As workers are started: the mark travels as a file descriptor.
        worker = multiprocessing.get_context("spawn").Process(
            target=begin_and_die, args=(mark, step_id)
        )
        worker.start()
        worker.join(30)
        assert (worker.exitcode, mark.step_id) == (-signal.SIGKILL, step_id)
