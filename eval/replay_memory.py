"""The product's memory manager driven by a routing trace: on the server's arena, or on another one."""

import math
from collections.abc import Sequence

import msgspec

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.prediction.trace import Kind, Totals, Trace

STATIC_RATIOS = tuple(percent / 100 for percent in range(10, 100, 10))
REQUEST_KINDS = (Kind.ADMIT, Kind.EXTEND, Kind.COMMIT, Kind.RELEASE)
ANSWERED_KINDS = (Kind.ADMIT, Kind.EXTEND, Kind.COMMIT)


class LoadCounter:
    """Stands where the copier stands in a server."""

    def __init__(self) -> None:
        self.num_groups = 0
        self.num_experts = 0

    def load(self, loads: Sequence[Load]) -> None:
        self.num_groups += 1
        self.num_experts += len(loads)


class Replay:
    """A trace's calls, one by one, on a memory of the given size and policy.

    A request that finds no room, or that memory answers otherwise than the server's, is on record
    in `rejected` and `differing`; the former is left out from there on.
    """

    def __init__(
        self, trace: Trace, *, num_frames: int, policy: MemoryPolicy, expert_ratio: float = 0.0
    ) -> None:
        self._trace = trace
        self._layers = trace.experts_by_layer()
        self._tokens = [trace.tokens_of(i) for i in range(len(trace.info.namespaces))]
        self._left_out: set[int] = set()
        self.rejected = 0
        self.differing: list[str] = []
        self.memory = new_memory(
            trace, num_frames, LoadCounter(), policy=policy, expert_ratio=expert_ratio
        )

    def run(self) -> None:
        for index, row in enumerate(self._trace.operations.tolist()):
            kind, request, *_, expected = row
            if request in self._left_out and kind in REQUEST_KINDS:
                if kind != Kind.ADMIT:
                    continue
                self._left_out.remove(request)
            got = self._apply(*row[:4])
            if kind in ANSWERED_KINDS and got != expected:
                self.differing.append(
                    f"operation {index}, {Kind(kind).name} of request {request}, gave {got} where "
                    f"the server had {expected}"
                )
            if kind == Kind.EXTEND and expected and not got:
                self._leave_out(request)

    def _leave_out(self, request: int) -> None:
        self.rejected += 1
        self._left_out.add(request)
        self.memory.release(str(request), b"", 0)

    def _apply(self, kind: int, request: int, amount: int, limit: int) -> int:
        memory, rid = self.memory, str(request)
        match kind:
            case Kind.ADMIT:
                namespace = self._trace.info.namespaces[request]
                limited = None if limit < 0 else limit
                tokens = self._bytes(request, amount)
                return memory.admit(rid, tokens, namespace, max_cached_tokens=limited)
            case Kind.EXTEND:
                return memory.extend(rid, amount)
            case Kind.COMMIT:
                return memory.commit(rid, self._bytes(request, amount), amount)
            case Kind.RELEASE:
                memory.release(rid, self._bytes(request, amount), amount)
            case Kind.FLUSH:
                memory.flush_cache()
            case Kind.FORWARD:
                run_step(memory, self._layers[request])
            case Kind.PRICES:
                memory.set_prices(expert_nanoseconds=amount, token_nanoseconds=limit)
        return 0

    def _bytes(self, request: int, num_tokens: int) -> bytes:
        return self._tokens[request][:num_tokens].tobytes()


def replay_whole(trace: Trace) -> Totals:
    """All of the trace, on the server's own arena and policy: the counters that memory ends with.

    Raises ValueError where memory answers otherwise than it did to the server.
    """
    info = trace.info
    replay = Replay(
        trace,
        num_frames=info.geometry.num_frames,
        policy=info.policy,
        expert_ratio=info.expert_ratio,
    )
    replay.run()
    if replay.differing:
        raise ValueError(f"memory has changed since this was recorded: {replay.differing[0]}")
    snapshot = replay.memory.snapshot(0)
    return Totals(*(getattr(snapshot, name) for name in Totals.__struct_fields__))


def run_step(memory: MemoryManager, layers: Sequence[Sequence[int]]) -> None:
    memory.begin_step()
    for layer, experts in enumerate(layers):
        for _ in memory.waves(layer, experts):
            pass


def new_memory(
    trace: Trace,
    num_frames: int,
    counter: LoadCounter,
    *,
    policy: MemoryPolicy,
    expert_ratio: float = 0.0,
) -> MemoryManager:
    geometry: Geometry = msgspec.structs.replace(trace.info.geometry, num_frames=num_frames)
    memory = MemoryManager(
        geometry,
        num_layers=trace.info.num_layers,
        num_experts=trace.info.num_experts,
        floor_frames=trace.info.floor_frames,
        load_experts=counter.load,
        policy=policy,
        expert_ratio=expert_ratio,
    )
    memory.pause_streaming(True)  # as in the server while it recorded
    return memory


class Savings(msgspec.Struct, frozen=True):
    """A policy on all of a trace: what was there when it was needed, and what that saved."""

    policy: str
    frames: int
    expert_hits: int
    cached_tokens: int
    rejected: int  # requests for whose KV there was no room, left out from there on
    seconds_saved: float


def replay_savings(
    trace: Trace, num_frames: int, policy: MemoryPolicy, expert_ratio: float = 0.0
) -> Savings:
    """What that memory would have saved, at the prices that the server measured."""
    replay = Replay(trace, num_frames=num_frames, policy=policy, expert_ratio=expert_ratio)
    replay.run()
    snapshot, prices = replay.memory.snapshot(0), replay.memory.prices
    name = policy.value if policy is not MemoryPolicy.STATIC else f"static={expert_ratio:.0%}"
    return Savings(
        policy=name,
        frames=num_frames,
        expert_hits=snapshot.expert_hits,
        cached_tokens=snapshot.cache_hit_tokens,
        rejected=replay.rejected,
        seconds_saved=1e-9
        * (
            snapshot.expert_hits * prices.expert_nanoseconds
            + snapshot.cache_hit_tokens * prices.token_nanoseconds
        ),
    )


def compare_savings(trace: Trace, num_frames: int) -> list[Savings]:
    """One budget by cost and by LRU, and every static split that rejects nobody."""
    unified = [
        replay_savings(trace, num_frames, policy)
        for policy in (MemoryPolicy.COST_AWARE, MemoryPolicy.LRU)
    ]
    splits = [
        replay_savings(trace, num_frames, MemoryPolicy.STATIC, ratio)
        for ratio in STATIC_RATIOS
        if num_frames * ratio >= trace.info.num_layers * trace.info.top_k
    ]
    return unified + [its for its in splits if its.rejected <= unified[0].rejected]


def whole_frames(trace: Trace) -> int:
    """Frames for all experts and for all KV of the requests that ran at once."""
    info = trace.info
    held: dict[int, int] = {}
    most = 0
    for kind, request, amount, *_ in trace.operations.tolist():
        if kind == Kind.EXTEND:
            held[request] = amount
            most = max(most, sum(held.values()))
        elif kind == Kind.RELEASE:
            held.pop(request, None)
    tokens_per_frame = info.geometry.page_tokens * info.geometry.pages_per_frame
    return info.num_layers * info.num_experts + math.ceil(most / tokens_per_frame)
