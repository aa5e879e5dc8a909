"""CUDA graphs on a CPU: a stand-in for torch's that records operations, and runs them again on the same tensors.

What matters to us it has of a CUDA graph: replayed, it runs no Python, and results go where they went before; captured, it
knows no values, so asking for one fails and a break sees garbage; and what a segment has made is garbage as soon as no later
one reads it, as SGLang's pool gives memory to others. SGLang's runner and backend run on it. In a fork only (`forking`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from msgspec.structs import asdict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglmoe.kernels import reference
from sglmoe.worker import captured_steps, step_messages
from sglmoe.worker.moe_layer_method import activation_of

# What CUDA can't capture: the host would have to wait for a value, or for the size of a result.
NEEDS_THE_HOST = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")


class Call(NamedTuple):
    """An operation, and what it has made of which tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any

    def again(self) -> None:
        made = self.function(*self.args, **self.kwargs)
        for place, value in zip(tensors(self.made), tensors(made), strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(trees: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    found = (tensor.untyped_storage() for tree in trees for tensor in tensors(tree))
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


class Recorder(TorchDispatchMode):
    """Between the two ends of a segment."""

    def __init__(self, calls: list[Call]):
        super().__init__()
        self._calls = calls
        self._in_one = False  # operation that is recorded as a whole

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._in_one:
            name = func.overloadpacket.__name__
            if name in NEEDS_THE_HOST:
                raise RuntimeError(f"{name} is not permitted when the stream is capturing")
            self._calls.append(Call(func, args, kwargs or {}, made))
        return made

    def as_one(self, function: Callable[[], torch.Tensor], reads: tuple[Any, ...]) -> torch.Tensor:
        """What `function` does with `reads`, which it may look into, as a kernel would."""
        self._in_one = True
        made = function()
        self._in_one = False
        self._calls.append(Call(lambda *_: function(), reads, {}, made))
        return made


class RecordedGraph:
    """In the place of `torch.cuda.CUDAGraph`: a segment."""

    captured: ClassVar[list["RecordedGraph"]] = []
    recorder: ClassVar[Recorder | None] = None  # while one is captured
    replayed: ClassVar["RecordedGraph | None"] = None  # the last
    num_replays = 0

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._dead: list[torch.UntypedStorage] | None = None

    def capture_begin(self, **_: Any) -> None:
        RecordedGraph.recorder = Recorder(self.calls)
        RecordedGraph.recorder.__enter__()

    def capture_end(self) -> None:
        assert RecordedGraph.recorder is not None
        RecordedGraph.recorder.__exit__(None, None, None)
        RecordedGraph.recorder = None
        RecordedGraph.captured.append(self)
        spoil(self._own())

    def replay(self) -> None:
        if RecordedGraph.replayed is not None:
            RecordedGraph.replayed.forget()
        for call in self.calls:
            call.again()
        RecordedGraph.replayed = self
        RecordedGraph.num_replays += 1

    def forget(self) -> None:
        """Spoil what no later segment reads."""
        if self._dead is None:
            later = RecordedGraph.captured[RecordedGraph.captured.index(self) + 1 :]
            read = storages((call.args, call.kwargs) for graph in later for call in graph.calls)
            self._dead = [its for its in self._own() if its.data_ptr() not in read]
        spoil(self._dead)

    def _own(self) -> list[torch.UntypedStorage]:
        """What it has made: not what it was given, such as weights and KV."""
        given: set[int] = set()
        own: dict[int, torch.UntypedStorage] = {}
        for call in self.calls:
            given |= storages([call.args, call.kwargs]).keys() - own.keys()
            made = storages([call.made])
            own |= {key: its for key, its in made.items() if key not in given}
        return list(own.values())


def spoil(own: Iterable[torch.UntypedStorage]) -> None:
    """As floats or as ids: no numbers, and no experts."""
    for storage in own:
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)  # type: ignore[call-overload]


@contextmanager
def whole_graph(*, cuda_graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    cuda_graph.capture_begin()
    yield
    cuda_graph.capture_end()


class RecordedKernels:
    """In the place of `TritonKernels`: what they must do, in torch, each as one operation. `at_boundary`, where it is set, is
    called with the layer first, whenever one is computed: what happens beside the device."""

    at_boundary: ClassVar[Callable[[int], None] | None] = None

    def __init__(
        self,
        blocks: torch.Tensor,
        arena: torch.Tensor,
        *,
        frame_bytes: int,
        experts: Any,
        packed: Any,
    ):
        self._where = {"blocks": blocks, "arena": arena, "frame_bytes": frame_bytes}
        self._page_in: Callable[..., None] = reference.page_in
        if packed is not None:
            self._where["its"] = packed
            self._page_in = reference.page_in_packed
        self._experts = copy(
            experts
        )  # one that asks nobody for its experts, and tells nobody of them
        self._experts.waves = lambda layer, needed: iter([needed])
        self._experts.counters = []

    def commit(self, mailbox: Any, layer: int, state: Any, *, step: torch.Tensor) -> None:
        def commit() -> torch.Tensor:
            if RecordedKernels.at_boundary is not None:
                RecordedKernels.at_boundary(layer)
            reference.commit(mailbox, layer, state, step=step)
            return cast("torch.Tensor", state.frame_table)

        as_one(commit, (*asdict(mailbox).values(), *asdict(state).values(), step))

    def dispatch(self, routing: Any, **its: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, -1 for rows that pad the step, and frames: blocks are of no use to a layer that computes expert by expert."""
        state, layer = its["state"], routing.layer

        def dispatch() -> torch.Tensor:
            reference.dispatch(routing.ids, layer, block_tokens=1, **its)
            return cast("torch.Tensor", state.frame_table)

        written = (*asdict(state).values(), *asdict(its["page_ins"]).values(), its["ids"])
        as_one(dispatch, (routing.ids, its["num_rows"], *written))
        return its["ids"], state.frame_table[layer]

    def page_in(self, page_ins: Any) -> None:
        its = asdict(page_ins)

        def page_in() -> torch.Tensor:
            self._page_in(**self._where, **its)
            return cast("torch.Tensor", self._where["arena"])

        as_one(page_in, (self._where["arena"], *its.values()))

    def forward(
        self, routing: Any, weights: torch.Tensor, dispatched: Any, *, config: Any
    ) -> torch.Tensor:
        (ids, frame_table), hidden = dispatched, routing.hidden

        def forward() -> torch.Tensor:
            output = torch.zeros_like(hidden)
            num_rows = int((ids[:, 0] >= 0).sum())
            if num_rows:
                self._experts._frame_table = {routing.layer: frame_table.numpy()}
                output[:num_rows] = self._experts.forward_by_expert(
                    routing.layer,
                    hidden[:num_rows],
                    weights[:num_rows],
                    ids[:num_rows],
                    activation_of(config),
                )
            return output

        return as_one(forward, (ids, hidden, weights, frame_table))


def as_one(function: Callable[[], torch.Tensor], reads: tuple[Any, ...]) -> torch.Tensor:
    recorder = RecordedGraph.recorder
    return function() if recorder is None else recorder.as_one(function, reads)


def capture_on_cpu(sizes: list[int], backend: str = "breakable") -> None:
    """Have SGLang capture decode steps of these sizes, which no flag does here: between `start_process` and `load_model`."""
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner
    from sglang.srt.runtime_context import get_exec

    decode = get_exec().graph.cuda_graph_config.decode
    decode.backend, decode.bs, decode.max_bs = backend, sizes, max(sizes)
    torch.cuda.CUDAGraph = RecordedGraph  # type: ignore[assignment, misc]
    torch.cpu.graph = whole_graph  # type: ignore[attr-defined]
    captured_steps.TritonKernels = RecordedKernels  # type: ignore[assignment, misc]
    step_messages.post = reference.post
    torch.cpu.graph_pool_handle = lambda: (0, 0)  # type: ignore[attr-defined]
    torch.cpu.is_current_stream_capturing = lambda: False  # type: ignore[attr-defined]
    decode_cuda_graph_runner.graph_capture = lambda stream: nullcontext(
        SimpleNamespace(stream=stream)
    )
    start_runners = ModelRunner.init_cuda_graphs

    def init_cuda_graphs(self: Any) -> None:
        start_runners(self)
        self.decode_cuda_graph_runner = decode_cuda_graph_runner.DecodeCudaGraphRunner(
            self, attn_backend=make_attention()(self)
        )

    ModelRunner.init_cuda_graphs = init_cuda_graphs


def make_attention() -> type:
    """SGLang's on a CPU, which looks into lengths and KV ids: here one operation, as on a GPU."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class RecordedAttention(TorchNativeAttnBackend):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            pass

        def get_cuda_graph_seq_len_fill_value(self) -> int:
            return 1

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **flags: Any
        ) -> Any:
            decode = super().forward_decode
            pool, number = self.token_to_kv_pool, layer.layer_id
            kv = (pool.get_key_buffer(number), pool.get_value_buffer(number))
            return as_one(lambda: decode(q, k, v, layer, batch, **flags), (q, k, v, *kv))

    return RecordedAttention
