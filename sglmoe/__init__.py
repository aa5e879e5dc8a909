"""SGLang under one memory budget for KV cache and experts. `sglmoe.Engine` is the offline front door."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglmoe.engine import Engine as Engine


def __getattr__(name: str) -> object:
    # Lazy: the engine imports sglang, which costs seconds that most of our modules need not pay.
    if name == "Engine":
        from sglmoe.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
