"""Our own engine, asked offline. Everything here runs in a fork (`forking`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def running_sglmoe(model_dir: Path, **options: Any) -> Iterator[Any]:
    """A `sglmoe.Engine` with room for 16 requests."""
    from sglmoe import Engine

    engine = Engine(
        model_path=str(model_dir),
        max_running_requests=16,
        random_seed=0,
        log_level="warning",
        **options,
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def state_of(engine: Any) -> dict[str, Any]:
    """What `/server_info` says of memory: `memory` (the last snapshot) and `limits`."""
    (state,) = engine.get_server_info()["internal_states"]
    return dict(state["sglmoe"])


def frames_budget(engine_state: dict[str, Any], num_frames: int) -> str:
    """The --memory-budget under which the same model has exactly `num_frames` frames."""
    frame_bytes = engine_state["memory"]["frame_bytes"]
    return str(engine_state["limits"]["dense_bytes"] + num_frames * frame_bytes)


def check_loads(memory: dict[str, Any], num_loads: int, *, expert_bytes: int) -> None:
    """Every expert that came into a frame came from somewhere, and what came from there went into one; but for
    prefetches that were given up, which may have been read by then."""
    num_moved, rest = divmod(memory["expert_bytes_moved"], expert_bytes)
    assert rest == 0
    num_landed = num_moved - memory["expert_misses"] + memory["prefetches_late"]
    num_given_up = memory["prefetches_begun"] - num_landed
    assert num_moved <= num_loads <= num_moved + num_given_up
