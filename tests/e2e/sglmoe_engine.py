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
