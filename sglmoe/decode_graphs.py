"""Which decode steps are captured as CUDA graphs, and what of the budget is set aside for them. Pure.

The server and its plan both go by it; capturing is `worker/model_runner_graphs.py`.
"""

import msgspec

from sglmoe.config import DEFAULT_MAX_RUNNING, MemoryPolicy
from sglmoe.errors.options import graph_sizes_without_graphs, graphs_on_a_cpu

# What SGLang sets aside for a row of the largest captured step: `reserve_for_graph_mb`. Not measured with breaks.
ROW_BYTES = 2 * 2**20
# Arbitrary: of a captured decode step, where no flag says how many. Larger steps run eagerly; they spend their time on experts.
MAX_CAPTURED_ROWS = 32


class GraphFlags(msgspec.Struct, frozen=True):
    """SGLang's flags about decode steps out of CUDA graphs, as they were given."""

    backend: str | None = None  # --cuda-graph-backend-decode
    sizes: tuple[int, ...] = ()  # --cuda-graph-bs-decode
    max_size: int | None = None  # --cuda-graph-max-bs-decode
    no_padding: bool = False  # --disable-cuda-graph-padding

    @property
    def captures(self) -> bool:
        """Whether any step is captured, by whichever backend."""
        return self.backend not in (None, "disabled")


class DecodeGraphs(msgspec.Struct, frozen=True):
    """What is captured, and what of the budget is set aside for that."""

    max_rows: int = 0  # of the largest batch; 0: none is captured
    reserved_bytes: int = 0
    is_full: bool = False  # else graphs break at each MoE layer

    def lent_beside(self, context_tokens: int, policy: MemoryPolicy) -> int | None:
        """Tokens of KV beside which frames are to be kept for steps without the host: None where there is no such step, or
        layers have shares of the frames anyway."""
        has_shares = policy is MemoryPolicy.STATIC
        return context_tokens if self.is_full and not has_shares else None


def check_graphs(flags: GraphFlags, *, on_gpu: bool) -> None:
    """Raises ValueError for what would be ignored."""
    about_sizes = {
        "--cuda-graph-bs-decode": flags.sizes,
        "--cuda-graph-max-bs-decode": flags.max_size,
        "--disable-cuda-graph-padding": flags.no_padding,
    }
    given = [flag for flag, value in about_sizes.items() if value]
    if given and not flags.captures:
        raise graph_sizes_without_graphs(flag=given[0])
    if flags.captures and not on_gpu:
        raise graphs_on_a_cpu(backend=str(flags.backend))


def default_max_rows(max_running: int | None) -> int:
    """Rows of the largest step that is captured where no flag says how many. `max_running`: --max-running-requests."""
    return min(max_running or MAX_CAPTURED_ROWS, MAX_CAPTURED_ROWS)


def captured_rows(flags: GraphFlags, max_running: int | None) -> int:
    """Rows of the largest step that is captured, 0 where none is; no more than requests may run."""
    if not flags.captures:
        return 0
    asked = max(flags.sizes, default=flags.max_size or default_max_rows(max_running))
    return min(asked, max_running or DEFAULT_MAX_RUNNING)


def has_padding(graphs: DecodeGraphs, *, on_gpu: bool) -> bool:
    """Whether KV id 0 is to be no request's: rows that pad a captured step write there, and SGLang's kernels for CUDA take it
    for padding always and store nothing (`reserved_skip_index` of its `store_cache` and `set_mla_kv_buffer`)."""
    return on_gpu or graphs.max_rows > 0


def graph_bytes(max_rows: int, *, context_tokens: int, vocab_size: int) -> int:
    """What steps of up to so many rows are taken to need: SGLang's rule of thumb, and beside it two buffers of float32 logits,
    and what attention kernels read KV ids from, int64 at most, for whole contexts."""
    return max_rows * (ROW_BYTES + 2 * 4 * vocab_size + 8 * context_tokens)
