"""What the scheduler and the worker say to each other.

Two closed unions of frozen msgspec structs, `ToWorker` and `FromWorker`. A request's data is sent once (`NewRequest`) and
named by its rid after that. Both ends ship in one wheel, so an unknown field is an error. Durations may cross the
processes, timestamps may not. Token ids travel as little-endian int32 bytes: decoding 4,096 of them as a list costs 200
times as much.
"""

from typing import Literal

import msgspec

PROTOCOL_VERSION = 8


class Struct(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A part of a message."""


class Message(
    msgspec.Struct, tag=True, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False
):
    """Something that is sent on its own."""


# ---------------------------------------------------------------------------------------------------- scheduler -> worker


class LogprobSpec(Struct, frozen=True):
    """Which log probabilities a request wants back."""

    start: int  # first prompt position whose logprob is wanted; the prompt's length if none is
    num_top: int
    token_ids: tuple[int, ...] | None


class NewRequest(Struct, frozen=True):
    """Everything the worker needs to know of a request, sent once."""

    rid: str
    prompt_ids: bytes  # int32
    output_ids: bytes  # int32; what it has generated already, when the worker is a new one
    sampling: bytes  # sglang's SamplingParams as msgpack; opaque but to the files that know sglang
    max_new_tokens: int
    namespace: str  # requests share cached prefixes only within one
    logprobs: LogprobSpec | None
    routed_experts_start: (
        int | None
    )  # return the routing of the tokens from here on; None for no routing
    requires_reasoning: bool  # the grammar starts to bind after the reasoning ends


class Row(Struct, frozen=True):
    """Advance one request: prefill at most `num_tokens` more of it, or decode one token where nothing is left to prefill."""

    rid: str
    num_tokens: int


class StepPlan(Message, frozen=True):
    """One step of the worker. It first drops and preempts, then serves the rows, earlier ones first in line for memory."""

    step_id: int
    rows: tuple[Row, ...] = ()
    drop: tuple[str, ...] = ()  # finished or aborted: forget them, keep their KV as cached prefixes
    preempt: tuple[str, ...] = ()  # give their memory back, keep the rest for later
    probe: tuple[str, ...] = ()  # answer how much of each is cached


class AddRequests(Message, frozen=True):
    """Requests that plans may name from now on."""

    requests: tuple[NewRequest, ...]


class FlushCache(Message, frozen=True):
    """Forget every cached prefix that no running request uses; answered by `CallDone`."""

    call_id: int


class Profile(Message, frozen=True):
    """Start (with a folder to write to) or stop (without) torch's profiler; answered by `CallDone`."""

    call_id: int
    output_dir: str | None
    activities: tuple[str, ...] = ()
    with_stack: bool = False
    record_shapes: bool = False
    name: str = ""


class RecordRouting(Message, frozen=True):
    """Start, stop or write a routing trace (`prediction/trace.py`); answered by `CallDone`."""

    call_id: int
    action: Literal["start", "stop", "dump"]
    directory: str


class ShowMemory(Message, frozen=True):
    """Draw who is in which frame; answered by `CallDone` with a `MemoryMap`. Sent while somebody looks, and only then."""

    call_id: int


class Shutdown(Message, frozen=True):
    """Leave with exit status 0."""


WorkerCall = FlushCache | Profile | RecordRouting | ShowMemory  # each is answered by `CallDone`
ToWorker = StepPlan | AddRequests | WorkerCall | Shutdown

# ---------------------------------------------------------------------------------------------------- worker -> scheduler


class Limits(Struct, frozen=True):
    """What the worker found it can do, fixed at start-up."""

    total_tokens: int  # KV of running requests may grow to this
    page_tokens: int
    max_running: int
    context_tokens: int
    vocab_size: int
    dense_bytes: int = 0  # weights that stay on the device
    arena_bytes: int = 0  # the rest of the budget, cut into frames
    expert_bytes: int = 0  # of all experts in the checkpoint, as the device holds them
    floor_frames: int = 0  # never taken by KV
    graph_bytes: int = 0  # of the budget, set aside for CUDA graphs


class ResidencyPlan(Struct, frozen=True):
    """How many requests should run at once, and what is expected of that (`memory/residency.py`)."""

    running_limit: int | None = None  # None: as many as KV memory and the flags allow
    expert_frames: int = 0  # that their KV leaves to experts
    num_running: int = 0  # requests in the step that the next three are predicted of
    misses: float = 0.0  # experts to load in it
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    measured_running: float = 0.0  # mean of the decode steps since the plan before, as the next two
    measured_misses: float = 0.0
    measured_step_seconds: float = 0.0
    reason: str = "no plan was made"


class PrefetchReport(Struct, frozen=True):
    """What is known of predictions, and whether it pays to act on them (`worker/prefetching.py`)."""

    mode: str = "off"
    is_on: bool = False  # experts are being brought in ahead of their layers
    verdict: str = "undecided"  # of the last trial of steps with against steps without
    step_ratio: float = 1.0  # how long a step took in it, as a share of one without
    predictor: str = ""  # none is picked yet
    reason: str = ""  # why that one
    horizon_layers: int = 0
    precision: float = 0.0  # of the experts expected in the layer ahead, those that were used
    recall: float = 0.0  # of the experts used, those that were expected
    batch_accuracy: float = 0.0  # the mean of each layer's recall (He et al., arXiv 2410.17954)
    recall_by_layer: tuple[float, ...] = ()
    coverage: dict[
        str, float
    ] = {}  # by predictor: of experts missed, those that plans would have brought in
    saved_seconds: float = 0.0  # that demand loads of the prefetched experts used would have taken
    skipped_steps: int = 0  # of which the predictor was not told, because it was behind
    failed: bool = False  # the predictor has; nothing is predicted any more


class StepCosts(Struct, frozen=True):
    """What steps cost, measured by the worker (`memory/step_times.py`). 0: not measured, or nothing."""

    stream_seconds: float = 0.0  # a pass over prompts is longer by, for the experts it has to load
    token_seconds: float = 0.0  # and for each token of a prompt
    decode_seconds: float = 0.0  # a decode step but for its rows: the fixed part, and its loads
    row_seconds: float = 0.0  # and for each request that decodes
    loads_overlap: bool = False  # with computing


class PackedReport(Struct, frozen=True):
    """What the last plan for packed experts in the arena says, and what it was made from."""

    target_frames: int = 0  # that are to hold them
    decode_ratio: float = 1.0  # what decoding one takes, as a share of what loading one takes
    stall_seconds: float = 0.0  # of a decode step, as predicted
    ready_only_seconds: float = 0.0  # likewise, with nothing packed
    reason: str = ""


class MemorySnapshot(Struct, frozen=True):
    """The state of the worker's memory after a step; stale on arrival. Counters run from the start of the worker."""

    step_id: int
    num_frames: int
    frame_bytes: int
    free_frames: int
    expert_frames: int
    kv_frames: int
    total_pages: int  # as many as all frames but the floor of expert frames would hold
    locked_pages: int  # KV of running requests
    cached_pages: int  # prefixes that nobody uses now
    free_pages: int  # within KV frames: nothing is in them, yet no expert can use them
    page_tokens: int
    expert_hits: int
    expert_misses: int
    expert_bytes_moved: int
    stall_seconds: float  # time the forward pass waited for experts
    num_waves: int
    num_split_layers: int  # layer passes that took more than one wave
    experts_evicted: int
    pages_evicted: int
    cache_hit_tokens: int
    prefill_tokens: int
    ghost_hit_tokens: int  # that would have been found cached had they not been evicted
    lent_steps: int = 0  # decode steps that were lent frames, and paged experts in without the host
    followed_steps: int = (
        0  # of them, those behind which another one began before memory heard of them
    )
    late_seconds: float = 0.0  # of stall_seconds, for experts that a prefetch was bringing already
    load_seconds: float = 0.0  # that loads on demand took, some of it while others computed
    prefetches_begun: int = 0
    experts_streamed: int = 0  # of these, for the next layer of a pass that uses most experts
    prefetches_used: int = 0  # were resident when their layer asked
    prefetches_late: int = 0  # were on their way; these are misses
    prefetches_wasted: int = 0  # given up, or evicted before anything used them
    host_blocks: int = 0  # of one expert each, in host memory
    host_blocks_filled: int = 0
    host_hits: int = 0  # missed experts that were in host memory
    disk_reads: int = 0  # missed experts that were read from the checkpoint
    disk_bytes: int = 0
    host_promoted: int = 0  # experts read into host memory in the background
    host_promoted_bytes: int = 0
    host_evicted: int = 0
    packed_frames: int = 0  # that packed experts are in
    packed_experts: int = 0
    packed_hits: int = 0  # missed experts that were packed in the arena, and decoded from there
    packed_kept: int = 0  # missed experts that were kept there as they came
    packed: PackedReport = PackedReport()
    plan: ResidencyPlan = ResidencyPlan()
    costs: StepCosts = StepCosts()
    prefetch: PrefetchReport = PrefetchReport()

    @property
    def available_pages(self) -> int:
        """Pages that new KV could take: everything but running requests' KV and the floor of expert frames."""
        return self.total_pages - self.locked_pages


class TokenLogprobs(Struct, frozen=True):
    """Log probabilities at one position."""

    token_id: int
    logprob: float | None  # None where there is none: the first token of a prompt
    top_logprobs: tuple[float, ...] = ()
    top_ids: tuple[int, ...] = ()
    picked_logprobs: tuple[float, ...] = ()  # of LogprobSpec.token_ids, in their order


class RoutedExperts(Struct, frozen=True):
    """Expert ids chosen for a run of tokens: int32 `[tokens, layers, top_k]`."""

    shape: tuple[int, int, int]
    ids: bytes


class RowResult(Struct, frozen=True):
    """What a row came to."""

    rid: str
    num_computed: int  # tokens of the request whose KV exists
    num_cached: int  # of these, found in the cache when the request was admitted
    token_id: int | None  # sampled; None in the middle of a prefill
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of this step's prefill
    routed_experts: RoutedExperts | None = None  # of the tokens computed in this step
    grammar_done: bool = False  # the grammar admits nothing after this token


class RowFailure(Struct, frozen=True):
    """A request that can't go on, through its own fault (4xx) or ours (5xx)."""

    rid: str
    status: int
    message: str


class WorkerReady(Message, frozen=True):
    """The first message of a worker that can serve."""

    protocol_version: int
    limits: Limits
    snapshot: MemorySnapshot
    load_seconds: float
    description: str  # one paragraph for people: where the bytes went
    pid: int = 0


class WorkerProgress(Message, frozen=True):
    """A sign of life while the worker is getting ready."""

    stage: str
    done: int
    total: int


class RequestReady(Message, frozen=True):
    """A request's grammar is compiled (`error` empty) or can't be."""

    rid: str
    error: str = ""


class StepResult(Message, frozen=True):
    """The answer to a `StepPlan`."""

    step_id: int
    rows: tuple[RowResult, ...]
    rejected: tuple[
        str, ...
    ]  # no memory for them in this step; they hold none now, plan them again later
    failed: tuple[RowFailure, ...]
    cached_tokens: dict[str, int]  # answers the plan's probes
    snapshot: MemorySnapshot
    step_seconds: float


class MemoryMap(Struct, frozen=True):
    """Who is in which frame, a letter each. What letters mean: `FRAME_KINDS`, `RESIDENCY` and `HEAT_LEVELS`."""

    frames: str  # [num_frames]
    residency: tuple[str, ...]  # by layer that has experts: [num_experts]
    heat: tuple[str, ...]  # likewise
    heat_is: Literal["share", "rank"]  # of steps that used the expert; of all experts, by use


# Letters of a `MemoryMap`.
FRAME_KINDS = {"free": ".", "expert": "e", "loading": "l", "packed": "p", "kv": "k", "cached": "c"}
RESIDENCY = {
    **{"stored": ".", "host": "h", "packed": "p", "loading": "l"},
    **{"ahead": "a", "resident": "r"},
}
HEAT_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"


class CallDone(Message, frozen=True):
    """The answer to the message with this call_id."""

    call_id: int
    success: bool
    message: str = ""
    memory: MemoryMap | None = None


class WorkerFailed(Message, frozen=True):
    """The last words of a worker: what went wrong and, where it is known, what to change."""

    error: str


FromWorker = WorkerReady | WorkerProgress | RequestReady | StepResult | CallDone | WorkerFailed
