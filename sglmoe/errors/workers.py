"""What becomes of a worker that is lost, in words: in the log, and in the answers of requests that pay for it."""

from sglmoe.errors.user_error import UserError


def stuck(*, seconds: float, owed: str) -> UserError:
    """`owed`: what it is waited for."""
    return UserError(
        f"the worker made no progress for {seconds:.0f} s in {owed} (--watchdog-timeout)"
    )


def silent_while_loading(*, seconds: float) -> UserError:
    return UserError(
        f"the worker was silent for {seconds:.0f} s while it loaded (--watchdog-timeout, and what the first one took)"
    )


def exited(*, status: int) -> UserError:
    return UserError(f"the worker exited with status {status}; its log says why")


def killed(*, signal_name: str) -> UserError:
    return UserError(f"the worker was killed by {signal_name}; its log says why")


def out_of_memory() -> UserError:
    return UserError(
        "the worker was killed by SIGKILL, probably out of memory; lower --memory-budget"
    )


def given_up(*, num_workers: int, cause: str) -> UserError:
    return UserError(
        f"{num_workers} workers in a row ended before they served anything, the last one so: {cause}"
    )
