"""Decode steps as CUDA graphs, which SGLang captures and replays. They break at each MoE layer, where experts are paged as in
eager steps, or are full and page experts themselves (`captured_steps.py`).

Rows that pad a captured batch cost what any row does, but for experts: they get none (`PagedExperts.compute`). Their KV goes
to the arena's padding pages, where SGLang's padding points: KV id 0, row 0 of the token table. No GPU has run this.

One of the files that know sglang.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglmoe.decode_graphs import DecodeGraphs, graph_bytes
from sglmoe.errors.budgets import graphs_beside_budget
from sglmoe.worker.captured_steps import CapturedSteps

logger = logging.getLogger(__name__)


def plan_decode_graphs(runner: Any) -> DecodeGraphs:
    """What SGLang's flags ask for, and no batches of more requests than may run."""
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.runtime_context import get_exec

    is_full = check_cuda_graph_backend(Phase.DECODE, Backend.FULL)
    if not is_full and not check_cuda_graph_backend(Phase.DECODE, Backend.BREAKABLE):
        return DecodeGraphs()
    sizes = get_exec().graph.cuda_graph_config.decode.bs
    max_rows = min(max(sizes), runner.req_to_token_pool.size)
    config = runner.model_config
    reserved_bytes = graph_bytes(
        max_rows, context_tokens=config.context_len, vocab_size=config.vocab_size
    )
    return DecodeGraphs(max_rows, reserved_bytes, is_full)


def capture_graphs(
    runner: Any, graphs: DecodeGraphs, on_progress: Callable[[str, int, int], None]
) -> None:
    """Start SGLang's runners, and capture what is planned. The arena is in place: graphs keep its address.

    SGLang computes every size thrice with nothing in it, which pages no expert in and leaves KV in the padding pages.
    """
    if graphs.max_rows:
        on_progress("capturing CUDA graphs", 0, 0)
        if not graphs.is_full:
            keep_logits_of_graphs()
            keep_to_one_stream(runner.model)
    # As sglang's scheduler; in inference mode, what is made could not be written outside of it.
    with torch.no_grad():
        runner.init_cuda_graphs()
    if not graphs.max_rows:
        return
    taken_bytes = int(runner.graph_memory_usage["decode"] * 2**30)
    over_bytes = taken_bytes - graphs.reserved_bytes
    if over_bytes > 0:
        message = graphs_beside_budget(
            taken_bytes=taken_bytes, reserved_bytes=graphs.reserved_bytes, over_bytes=over_bytes
        )
        logger.warning("%s", message)


class FullGraphs:
    """Has sglang replay the decode steps for which memory can lend frames, and compute the others eagerly."""

    def __init__(self, runner: Any, steps: CapturedSteps | None):
        """Without `steps` sglang replays what it can."""
        self._runner = runner
        self._steps = steps
        self._graphs: Any = runner.decode_cuda_graph_runner if steps else None

    @property
    def num_behind(self) -> int:
        """See `CapturedSteps.num_behind`."""
        return 0 if self._steps is None else self._steps.num_behind

    def lend(self, batch: Any, *, may_replay: bool) -> CapturedSteps | None:
        """For sglang's `forward` of the batch, which is next: what replays it, and takes frames back behind it. None where
        nothing does."""
        steps, graphs = self._steps, self._graphs
        if steps is None:
            return None
        fits = may_replay and batch.forward_mode.is_decode() and graphs.can_run_graph(batch)
        is_lent = fits and steps.lend(batch.batch_size)
        # None is what sglang takes for "nothing is captured".
        self._runner.decode_cuda_graph_runner = graphs if is_lent else None
        return steps if is_lent else None


def keep_logits_of_graphs() -> None:
    """Have sglang's breakable backend keep a decode step's logits; it fails at what holds them (its pull request 36749)."""
    from sglang.srt.model_executor.runner_backend import breakable_cuda_graph_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    stock = breakable_cuda_graph_backend.BreakableCudaGraphBackend
    name = f"{stock.__module__}.{stock.__name__}"
    HookRegistry.register(name, make_logits_backend(stock), HookType.REPLACE)
    HookRegistry.apply_hooks()


def make_logits_backend(base: type) -> type:
    """A subclass of sglang's breakable backend, for which a graph's output is a tensor."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    class LogitsBackend(base):
        def capture_one(
            self, shape_key: Any, forward_fn: Callable[[], Any], *others: Any, **options: Any
        ) -> None:
            def logits() -> torch.Tensor:
                output: torch.Tensor = forward_fn().next_token_logits
                return output

            super().capture_one(shape_key, logits, *others, **options)

        def replay(self, shape_key: Any, static_forward_batch: Any, **options: Any) -> Any:
            logits = super().replay(shape_key, static_forward_batch, **options)
            return LogitsProcessorOutput(next_token_logits=logits)

    return LogitsBackend


def keep_to_one_stream(model: torch.nn.Module) -> None:
    """Have blocks of experts compute shared experts before the others, not beside them (Qwen2-MoE): a graph can break only on
    the stream that it is captured on."""
    for module in model.modules():
        if hasattr(module, "experts") and hasattr(module, "alt_stream"):
            module.alt_stream = None
