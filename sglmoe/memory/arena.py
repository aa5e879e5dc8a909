"""The shape of the arena and who owns each of its frames.

The arena is one run of bytes cut into equal frames; a frame holds one expert or a whole number of
KV pages. This file knows sizes and owners, neither what is in the bytes nor when anything is
evicted.
"""

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from itertools import chain

import msgspec

from sglmoe.errors import budgets
from sglmoe.units import ceil_div

PAGE_TOKENS_TRIED = (16, 8, 4, 2, 1)
MAX_WASTE_RATIO = 0.02  # DESIGN.md, section 3
DENSE_FRAME_BYTES = 2**20  # arbitrary: much less than a budget, much more than its bookkeeping
# To which SGLang pads the inner size of experts on a CPU: get_moe_padding_size.
CPU_INNER_MULTIPLE = 32
NUM_TOKEN_IDS = 2**31  # SGLang's req_to_token is int32


class Geometry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How the arena is cut: `padding_pages`, then frames. Frame f holds the pages from
    ``f * pages_per_frame``, and page p lies `page_bytes` behind page p - 1.

    Token o of page p has id ``(padding_pages + p) * page_rows + o``: a row is what one token keeps of
    one layer's K, or V, or MLA latent. Smaller ids are no request's: rows that pad a captured batch
    write their KV to id 0, and SGLang's kernels for CUDA write nothing there.
    """

    num_frames: int
    frame_bytes: int
    expert_bytes: int  # of the largest expert; 0 for a dense model
    page_bytes: int
    page_tokens: int
    pages_per_frame: int
    page_rows: int
    padding_pages: int = 0

    @property
    def padding_bytes(self) -> int:
        """Where frame 0 begins."""
        return self.padding_pages * self.page_bytes

    @property
    def arena_bytes(self) -> int:
        return self.padding_bytes + self.num_frames * self.frame_bytes

    @property
    def first_id(self) -> int:
        """The least KV id that a request may have."""
        return self.padding_pages * self.page_rows

    def kv_tokens(self, floor_frames: int) -> int:
        """That fit where so many frames are kept for experts."""
        return (self.num_frames - floor_frames) * self.pages_per_frame * self.page_tokens

    def frames_for(self, num_tokens: int) -> int:
        """That so many tokens of KV take."""
        return ceil_div(num_tokens, self.pages_per_frame * self.page_tokens)


def arena_bytes_within(
    budget_bytes: int, dense_bytes: int, *, decoding_bytes: int = 0, graph_bytes: int = 0
) -> int:
    """What the dense weights leave of the budget, decoding packed experts, and CUDA graphs.

    Raises ValueError where that is nothing.
    """
    if dense_bytes + decoding_bytes + graph_bytes >= budget_bytes:
        raise budgets.dense_weights_fill_budget(
            dense_bytes=dense_bytes,
            budget_bytes=budget_bytes,
            decoding_bytes=decoding_bytes,
            graph_bytes=graph_bytes,
        )
    return budget_bytes - dense_bytes - decoding_bytes - graph_bytes


def plan_geometry(
    *,
    arena_bytes: int,
    expert_bytes: int,
    token_bytes: int,
    token_rows: int,
    page_tokens: int | None,
    has_padding: bool = False,
    tensor_alignment: int = 256,
) -> Geometry:
    """Cut `arena_bytes` into frames of one expert each, rounded up to whole pages.

    `token_bytes` is a token's KV in all layers, as `token_rows` rows: ``2 * layers`` for K and V,
    ``layers`` for MLA. `expert_bytes` is 0 for a dense model. With `has_padding` there are padding
    pages. Frames start at multiples of `tensor_alignment` bytes. Raises ValueError when the arena
    can't hold one expert and one frame of KV.
    """
    if page_tokens is None:
        page_tokens = _choose_page_tokens(expert_bytes, token_bytes, tensor_alignment)
    page_bytes = page_tokens * token_bytes
    pages_per_frame = _pages_per_frame(expert_bytes, page_bytes, tensor_alignment)
    frame_bytes = pages_per_frame * page_bytes
    page_rows = page_tokens * token_rows
    padding_pages = _aligned_pages(page_bytes, tensor_alignment) if has_padding else 0
    arena_bytes -= padding_pages * page_bytes
    _check_arena(arena_bytes, expert_bytes=expert_bytes, frame_bytes=frame_bytes)
    num_pages = NUM_TOKEN_IDS // page_rows - padding_pages
    return Geometry(
        num_frames=min(arena_bytes // frame_bytes, num_pages // pages_per_frame),
        frame_bytes=frame_bytes,
        expert_bytes=expert_bytes,
        page_bytes=page_bytes,
        page_tokens=page_tokens,
        pages_per_frame=pages_per_frame,
        page_rows=page_rows,
        padding_pages=padding_pages,
    )


def _choose_page_tokens(expert_bytes: int, token_bytes: int, tensor_alignment: int) -> int:
    """The largest page whose rounding wastes little of a frame; if all waste much, the least
    wasteful."""
    if not expert_bytes:
        return PAGE_TOKENS_TRIED[0]

    def waste_ratio(page_tokens: int) -> float:
        page_bytes = page_tokens * token_bytes
        frame_bytes = _pages_per_frame(expert_bytes, page_bytes, tensor_alignment) * page_bytes
        return 1 - expert_bytes / frame_bytes

    thrifty = (tokens for tokens in PAGE_TOKENS_TRIED if waste_ratio(tokens) < MAX_WASTE_RATIO)
    return next(thrifty, min(PAGE_TOKENS_TRIED, key=waste_ratio))


def _pages_per_frame(expert_bytes: int, page_bytes: int, tensor_alignment: int) -> int:
    aligned_pages = _aligned_pages(page_bytes, tensor_alignment)
    num_pages = ceil_div(expert_bytes or DENSE_FRAME_BYTES, page_bytes)
    return ceil_div(num_pages, aligned_pages) * aligned_pages


def _aligned_pages(page_bytes: int, tensor_alignment: int) -> int:
    """The fewest pages behind which a tensor may start."""
    return math.lcm(page_bytes, tensor_alignment) // page_bytes


def _check_arena(arena_bytes: int, *, expert_bytes: int, frame_bytes: int) -> None:
    num_needed = 2 if expert_bytes else 1
    if arena_bytes >= num_needed * frame_bytes:
        return
    needed_bytes = num_needed * frame_bytes
    missing_bytes = needed_bytes - arena_bytes
    if not expert_bytes:
        raise budgets.no_room_for_kv(
            arena_bytes=arena_bytes, needed_bytes=needed_bytes, missing_bytes=missing_bytes
        )
    raise budgets.no_room_for_one_expert(
        arena_bytes=arena_bytes,
        expert_bytes=expert_bytes,
        needed_bytes=needed_bytes,
        missing_bytes=missing_bytes,
    )


def plan_floor(
    geometry: Geometry,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    context_tokens: int | None = None,
) -> int:
    """How many frames are kept for experts: those of one token in a layer, or a decode step of one request takes several waves.

    With `context_tokens` those of one token in all layers, where KV of so many tokens fits beside them: a step without the
    host needs all at once. `num_experts`: of a layer; 0 for a dense model.
    """
    if not num_experts:
        return 0
    lent_frames = least_lent(num_layers, num_experts, top_k)
    if context_tokens is None:
        return top_k
    fits = lent_frames + geometry.frames_for(context_tokens) <= geometry.num_frames
    return lent_frames if fits else top_k


def least_lent(num_layers: int, num_experts: int, top_k: int) -> int:
    """Frames that a step of one request takes without the host."""
    return num_layers * min(top_k, num_experts)


def check_floor(geometry: Geometry, floor_frames: int) -> None:
    """Raises ValueError where so many frames for experts leave none for KV."""
    needed_frames = floor_frames + 1
    if geometry.num_frames >= needed_frames:
        return
    raise budgets.too_few_frames(
        num_frames=geometry.num_frames,
        frame_bytes=geometry.frame_bytes,
        floor_frames=floor_frames,
        missing_bytes=(needed_frames - geometry.num_frames) * geometry.frame_bytes,
    )


class FrameKind(Enum):
    """What a frame holds."""

    FREE = "free"
    EXPERT = "expert"
    KV = "kv"
    PACKED = "packed"  # parts of packed experts: see `packed_slabs`


class Frames:
    """The owner of each frame. Every operation is O(1); the frame given back last is taken
    first."""

    def __init__(self, num_frames: int):
        self._kinds = [FrameKind.FREE] * num_frames
        self._experts: dict[int, tuple[int, int]] = {}
        self._free = list(range(num_frames - 1, -1, -1))
        self.num_packed = 0
        self._lent: list[int] = []  # free ones that a step without the host may fill
        self.are_lent = False  # to such a step: meanwhile only experts take others

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_empty(self) -> int:
        """Those that hold nothing, lent or not."""
        return len(self._free) + len(self._lent)

    @property
    def num_expert(self) -> int:
        return len(self._experts)

    @property
    def num_kv(self) -> int:
        return len(self._kinds) - self.num_empty - len(self._experts) - self.num_packed

    def kind(self, frame: int) -> FrameKind:
        return self._kinds[frame]

    def expert(self, frame: int) -> tuple[int, int]:
        """The (layer, expert) that owns an EXPERT frame."""
        return self._experts[frame]

    def free_frames(self) -> Iterable[int]:
        """Those of `num_empty`."""
        return chain(self._free, self._lent)

    def expert_frames(self) -> Iterable[int]:
        return self._experts

    def lend(self, num_frames: int) -> list[int]:
        """So many of the free ones, in the order in which they would be taken: no others may have them until `end_lending`."""
        assert num_frames <= len(self._free)
        assert not self.are_lent
        start = len(self._free) - num_frames
        self._lent = self._free[start:][::-1]
        del self._free[start:]
        self.are_lent = True
        return self._lent

    def end_lending(self) -> None:
        """Those that were lent are free as they were."""
        assert self.are_lent
        self._free += reversed(self._lent)
        self._lent = []
        self.are_lent = False

    def take_for_expert(self, layer: int, expert: int) -> int:
        """Turn a free frame, of which there must be one, into EXPERT(layer, expert)."""
        frame = self._free.pop()
        self._kinds[frame] = FrameKind.EXPERT
        self._experts[frame] = (layer, expert)
        return frame

    def take_for_kv(self) -> int:
        """Turn a free frame, of which there must be one, into KV."""
        return self._take(FrameKind.KV)

    def take_for_packed(self) -> int:
        """Turn a free frame, of which there must be one, into PACKED."""
        frame = self._take(FrameKind.PACKED)
        self.num_packed += 1
        return frame

    def assign(self, owners: Mapping[int, tuple[int, int]]) -> None:
        """Turn each of these frames, free or another expert's, into EXPERT(layer, expert)."""
        assert not self.are_lent
        taken = {frame for frame in owners if frame not in self._experts}
        if taken:
            self._free = [frame for frame in self._free if frame not in taken]
        for frame in taken:
            self._kinds[frame] = FrameKind.EXPERT
        self._experts.update(owners)

    def give(self, frame: int) -> None:
        """Make a frame FREE, whatever it held."""
        assert not self.are_lent
        assert self._kinds[frame] is not FrameKind.FREE, f"frame {frame} is given back twice"
        self._experts.pop(frame, None)
        self.num_packed -= self._kinds[frame] is FrameKind.PACKED
        self._kinds[frame] = FrameKind.FREE
        self._free.append(frame)

    def _take(self, kind: FrameKind) -> int:
        assert not self.are_lent
        frame = self._free.pop()
        self._kinds[frame] = kind
        return frame

    def violations(self) -> list[str]:
        """Frames free + expert + KV + packed = all."""
        by_kind = {
            kind: {frame for frame, its in enumerate(self._kinds) if its is kind}
            for kind in FrameKind
        }
        found = []
        if sorted(self._free + self._lent) != sorted(by_kind[FrameKind.FREE]):
            found.append("the list of free frames differs from the frames marked free")
        if self._experts.keys() != by_kind[FrameKind.EXPERT]:
            found.append("the experts' frames differ from the frames marked expert")
        if len(by_kind[FrameKind.KV]) != self.num_kv:
            found.append(f"{len(by_kind[FrameKind.KV])} KV frames are counted as {self.num_kv}")
        if len(by_kind[FrameKind.PACKED]) != self.num_packed:
            found.append(f"packed frames are counted wrong: {self.num_packed}")
        return found
