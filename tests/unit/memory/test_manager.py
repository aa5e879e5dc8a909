"""One budget: 8 frames, each an expert or 2 pages of 4 tokens.

The model has 2 layers of 4 experts and 3 layers of K and V.
"""

from array import array
from collections.abc import Iterator, Sequence

import pytest

from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.manager import MemoryManager

PAGE_ROWS = 2 * 3 * 4


def tokens(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def prompt(first: int, num_tokens: int) -> bytes:
    """`num_tokens` tokens that no prompt with another first one has."""
    return tokens(*(1000 * first + index for index in range(num_tokens)))


class Memory(MemoryManager):
    """A manager with small numbers that keeps what it was told to load."""

    def __init__(self, *, floor_frames: int = 2, num_frames: int = 8, padding_pages: int = 0):
        self.loads: list[list[tuple[int, int]]] = []
        self.fail_loads = False
        geometry = Geometry(
            num_frames=num_frames,
            frame_bytes=100,
            expert_bytes=90,
            page_bytes=50,
            page_tokens=4,
            pages_per_frame=2,
            page_rows=PAGE_ROWS,
            padding_pages=padding_pages,
        )
        super().__init__(
            geometry,
            num_layers=2,
            num_experts=4,
            floor_frames=floor_frames,
            load_experts=self._record,
        )

    def _record(self, loads: Sequence[Load]) -> None:
        if self.fail_loads:
            raise OSError("the disk is gone")
        self.loads.append([(load.layer, load.expert) for load in loads])

    def run(self, layer: int, *experts: int) -> list[list[int]]:
        """Compute a layer; its waves."""
        waves = []
        for wave in self.waves(layer, experts):
            assert all(self.frame_table[layer, expert] >= 0 for expert in wave)
            assert self.violations() == []
            waves.append(list(wave))
        assert self.violations() == []
        return waves

    def start(self, rid: str, prompt: bytes, *, namespace: str = "") -> bool:
        """Admit a request and compute all of its prompt."""
        self.admit(rid, prompt, namespace)
        fits = self.extend(rid, len(prompt) // 4)
        if fits:
            self.commit(rid, prompt, len(prompt) // 4)
        assert self.violations() == []
        return fits

    def cache(self, prompt: bytes) -> None:
        """Compute a request and let it finish."""
        assert self.start("cached", prompt)
        self.release("cached", prompt, len(prompt) // 4)
        assert self.violations() == []

    def residents(self) -> list[tuple[int, int]]:
        return [
            (layer, expert)
            for layer in range(2)
            for expert in range(4)
            if self.frame_table[layer, expert] >= 0
        ]


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    assert memory.violations() == []


# ---------------------------------------------------------------------------------------------- KV


def test_token_ids_are_scaled_by_the_rows_of_a_page(memory: Memory) -> None:
    memory.admit("a", prompt(1, 6), "")
    assert memory.extend("a", 6)
    assert memory.pages("a") == [0, 1]
    assert memory.token_ids("a", 0, 6).tolist() == [0, 1, 2, 3, PAGE_ROWS, PAGE_ROWS + 1]
    assert memory.token_ids("a", 3, 5).tolist() == [3, PAGE_ROWS]
    assert memory.token_ids("a", 5, 5).tolist() == []
    assert memory.token_id("a", 5) == PAGE_ROWS + 1


def test_no_request_has_the_kv_ids_of_rows_that_pad_a_batch() -> None:
    memory = Memory(padding_pages=1)
    memory.admit("a", prompt(1, 6), "")
    assert memory.extend("a", 6)
    assert memory.pages("a") == [0, 1]  # pages are counted from frame 0 on, as without
    first = PAGE_ROWS
    assert memory.token_ids("a", 3, 6).tolist() == [first + 3, 2 * first, 2 * first + 1]
    assert memory.token_id("a", 5) == 2 * first + 1
    assert memory.snapshot(0).total_pages == Memory().snapshot(0).total_pages
    assert memory.violations() == []
    memory._requests["a"].pages[0] = -1  # the padding
    assert "a has KV ids that are for rows that pad a batch" in memory.violations()


def test_decoding_takes_a_page_only_when_the_last_is_full(memory: Memory) -> None:
    memory.start("a", prompt(1, 3))
    for num_tokens, pages in ((4, [0]), (5, [0, 1]), (8, [0, 1]), (9, [0, 1, 2])):
        assert memory.extend("a", num_tokens)
        assert memory.pages("a") == pages


def test_a_running_requests_prefix_is_shared_as_soon_as_it_is_committed(memory: Memory) -> None:
    memory.admit("a", prompt(1, 10), "")
    memory.extend("a", 10)
    assert memory.probe(prompt(1, 10), "") == 0
    # A first chunk of 6 tokens is computed: one page is full.
    assert memory.commit("a", prompt(1, 10), 6) is False
    assert memory.probe(prompt(1, 10), "") == 4
    assert memory.admit("b", prompt(1, 10), "") == 4
    assert memory.pages("b") == [0]
    assert memory.probe(prompt(1, 10), "another namespace") == 0


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_at_least_one_token_is_left_to_compute(
    memory: Memory, num_tokens: int, num_cached: int
) -> None:
    memory.cache(prompt(1, 8))
    asked = prompt(1, num_tokens)
    assert memory.admit("a", asked, "") == num_cached
    assert memory.probe(asked, "") == min(8, num_tokens // 4 * 4)


def test_fewer_cached_tokens_can_be_asked_for(memory: Memory) -> None:
    # A request that wants the logprobs from token 6 on must compute it.
    memory.cache(prompt(1, 12))
    assert memory.admit("a", prompt(1, 12), "", max_cached_tokens=6) == 4
    assert memory.admit("b", prompt(1, 12), "", max_cached_tokens=0) == 0
    assert memory.violations() == []


def test_two_that_compute_the_same_end_up_on_the_same_pages(memory: Memory) -> None:
    same = prompt(1, 8)
    for rid in ("a", "b"):
        assert memory.admit(rid, same, "") == 0
        assert memory.extend(rid, 9)
    assert memory.pages("b") == [4, 5, 3]
    assert memory.commit("a", same, 8) is False
    assert memory.commit("b", same, 8) is True
    assert memory.violations() == []
    assert memory.pages("a") == [0, 1, 2]
    assert memory.pages("b") == [0, 1, 3]
    # Its own copies of the two pages are free.
    assert memory.snapshot(0).locked_pages == 4


def test_duplicates_of_a_finished_request_are_used_again(memory: Memory) -> None:
    same = prompt(1, 8)
    for rid in ("a", "b"):
        memory.admit(rid, same, "")
        memory.extend(rid, 8)
    memory.release("a", same, 8)
    assert memory.commit("b", same, 8) is True
    assert memory.violations() == []
    assert memory.pages("b") == [0, 1]
    assert memory.snapshot(0).locked_pages == 2


def test_duplicates_end_where_the_prompts_diverge(memory: Memory) -> None:
    stem = [1, 2, 3, 4]
    first, second = tokens(*stem, 5, 5, 5, 5), tokens(*stem, 6, 6, 6, 6)
    for rid, text in (("a", first), ("b", second)):
        memory.admit(rid, text, "")
        memory.extend(rid, 8)
    memory.commit("a", first, 8)
    assert memory.commit("b", second, 8) is True
    assert memory.pages("b") == [0, 3]


def test_release_keeps_full_pages_and_frees_the_rest(memory: Memory) -> None:
    memory.admit("a", prompt(1, 11), "")
    memory.extend("a", 11)
    memory.release("a", prompt(1, 11), 9)
    assert memory.violations() == []
    snapshot = memory.snapshot(0)
    assert (snapshot.locked_pages, snapshot.cached_pages) == (0, 2)
    assert (snapshot.kv_frames, snapshot.free_frames) == (1, 7)
    assert memory.probe(prompt(1, 11), "") == 8


def test_a_request_that_never_got_memory_leaves_nothing(memory: Memory) -> None:
    memory.cache(prompt(1, 4))
    memory.admit("a", prompt(1, 8), "")
    memory.admit("b", prompt(2, 8), "unused namespace")
    memory.release("a", prompt(1, 8), 4)
    memory.release("b", prompt(2, 8), 0)
    snapshot = memory.snapshot(0)
    assert (snapshot.locked_pages, snapshot.cached_pages) == (0, 1)
    assert (snapshot.cache_hit_tokens, snapshot.prefill_tokens) == (0, 4)


def test_flush_spares_what_is_running(memory: Memory) -> None:
    memory.cache(prompt(1, 12))
    memory.cache(prompt(2, 4))
    memory.admit("a", prompt(1, 8), "")
    memory.flush_cache()
    assert memory.violations() == []
    assert memory.probe(prompt(1, 12), "") == 4
    assert memory.probe(prompt(2, 4), "") == 0
    assert memory.snapshot(0).pages_evicted == 3


# ---------------------------------------------------------------------------- KV that needs memory


def test_extend_is_all_or_nothing_and_stops_at_the_floor(memory: Memory) -> None:
    # 8 frames without the floor of 2 are 12 pages.
    memory.start("a", prompt(1, 40))
    before = memory.snapshot(0)
    memory.admit("b", prompt(2, 12), "")
    assert memory.extend("b", 9) is False
    assert memory.pages("b") == []
    assert memory.snapshot(0) == before
    assert memory.extend("b", 8) is True
    assert memory.extend("a", 41) is False
    assert memory.snapshot(0).free_frames == 2


def test_prefixes_give_way_where_an_expert_would_be_evicted_in_vain(memory: Memory) -> None:
    # KV has all its 6 frames; the experts are older than the prefix, but theirs are the floor.
    memory.run(0, 0, 1)
    memory.cache(prompt(1, 32))
    memory.start("a", prompt(2, 16))
    assert memory.start("b", prompt(3, 8))
    assert memory.residents() == [(0, 0), (0, 1)]
    assert memory.probe(prompt(1, 32), "") == 24


def test_what_can_not_fit_evicts_nothing(memory: Memory) -> None:
    memory.cache(prompt(1, 16))
    memory.run(0, 0, 1, 2, 3)
    memory.admit("a", prompt(2, 60), "")
    assert memory.extend("a", 49) is False
    assert memory.probe(prompt(1, 16), "") == 16
    assert len(memory.residents()) == 4


def test_running_requests_outrank_experts_down_to_the_floor(memory: Memory) -> None:
    memory.run(0, 0, 1, 2, 3)
    memory.run(1, 0, 1, 2, 3)
    memory.run(0, 2)
    assert memory.start("a", prompt(1, 48))
    # The last two used are left: expert 2 of layer 0 was used again after layer 1.
    assert memory.residents() == [(0, 2), (1, 3)]
    assert memory.snapshot(0).experts_evicted == 6


def test_extend_takes_the_older_of_prefix_and_expert(memory: Memory) -> None:
    memory.run(0, 0, 1, 2, 3)
    memory.cache(prompt(1, 16))
    memory.run(1, 0, 1)  # 6 experts, 2 frames of prefix: all 8
    assert memory.start("a", prompt(2, 8))
    assert memory.residents() == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    memory.run(0, 1, 2, 3)
    assert memory.start("b", prompt(3, 16))
    assert memory.probe(prompt(1, 16), "") == 0
    assert len(memory.residents()) == 5


def test_a_prefix_loses_its_end_first_and_only_as_much_as_is_needed(memory: Memory) -> None:
    memory.cache(prompt(1, 48))
    assert memory.start("a", prompt(2, 10))
    assert memory.probe(prompt(1, 48), "") == 36
    assert memory.snapshot(0).pages_evicted == 3


def test_locked_prefixes_and_private_pages_are_never_evicted(memory: Memory) -> None:
    memory.cache(prompt(1, 24))
    memory.start("a", prompt(1, 25))
    memory.start("b", prompt(2, 20))
    pages = memory.pages("a")
    assert memory.start("c", prompt(3, 1)) is False
    assert memory.pages("a") == pages
    assert memory.probe(prompt(1, 24), "") == 24


def test_a_floor_that_leaves_no_kv_is_refused_with_numbers() -> None:
    with pytest.raises(
        ValueError,
        match=r"holds 8 frames of 100 B, but 8 .* 1 for KV cache: raise --memory-budget .* 100 B",
    ):
        Memory(floor_frames=8)


# ------------------------------------------------------------------------------------------- waves


def test_all_resident_is_one_wave_without_a_load(memory: Memory) -> None:
    memory.run(0, 3, 1)
    assert memory.run(0, 1, 3) == [[1, 3]]
    assert memory.loads == [[(0, 3), (0, 1)]]
    snapshot = memory.snapshot(0)
    assert (snapshot.expert_hits, snapshot.expert_misses) == (2, 2)
    assert (snapshot.num_waves, snapshot.num_split_layers) == (2, 0)
    assert snapshot.expert_bytes_moved == 180


def test_missing_experts_come_with_one_load_beside_the_residents(memory: Memory) -> None:
    memory.run(0, 2)
    assert memory.run(0, 0, 1, 2) == [[2, 0, 1]]
    assert memory.loads == [[(0, 2)], [(0, 0), (0, 1)]]


def test_a_layer_that_does_not_fit_takes_waves() -> None:
    memory = Memory(floor_frames=3)
    memory.start("a", prompt(1, 40))  # 5 frames
    memory.run(0, 3)
    # Residents first, with as many as there are frames for; the rest replaces what has run.
    assert memory.run(0, 0, 1, 2, 3) == [[3, 0, 1], [2]]
    assert memory.loads[1:] == [[(0, 0), (0, 1)], [(0, 2)]]
    # 3, 0 and 1 were used at the same time; of equals the lowest number goes.
    assert memory.residents() == [(0, 1), (0, 2), (0, 3)]
    snapshot = memory.snapshot(0)
    assert (snapshot.num_waves, snapshot.num_split_layers) == (3, 1)


def test_one_frame_is_enough_for_any_layer() -> None:
    # A page of a running request sits in every frame but the floor of one.
    memory = Memory(floor_frames=1)
    memory.start("a", prompt(1, 56))
    assert memory.run(0, 0, 1, 2, 3) == [[0], [1], [2], [3]]
    assert memory.run(1, 3, 0) == [[3], [0]]
    assert memory.residents() == [(1, 0)]
    snapshot = memory.snapshot(0)
    assert (snapshot.num_waves, snapshot.num_split_layers) == (6, 2)


def test_what_the_layer_needs_is_not_evicted_for_the_same_layer(memory: Memory) -> None:
    memory.run(0, 0, 1)  # older than everything else
    memory.run(1, 0, 1)
    memory.start("a", prompt(1, 32))  # 4 frames
    assert memory.run(0, 0, 1, 2) == [[0, 1, 2]]
    assert memory.residents() == [(0, 0), (0, 1), (0, 2), (1, 1)]


def two_that_share_frames(memory: Memory) -> None:
    """Cache prefix 1, then 2: each has a page in frame 0 and one in frame 1."""
    for rid, first in (("a", 1), ("b", 2)):
        memory.admit(rid, prompt(first, 8), "")
    for num_tokens in (4, 8):
        for rid in ("a", "b"):
            assert memory.extend(rid, num_tokens)
    assert (memory.pages("a"), memory.pages("b")) == ([0, 2], [1, 3])
    for rid, first in (("a", 1), ("b", 2)):
        memory.release(rid, prompt(first, 8), 8)


def test_experts_evict_only_what_empties_a_frame(memory: Memory) -> None:
    two_that_share_frames(memory)
    memory.run(0, 0, 1, 2, 3)
    memory.run(1, 0, 1)
    assert memory.run(1, 2) == [[2]]
    # The last page of each prefix lies in frame 1; all of prefix 1, the older, would empty none.
    assert memory.probe(prompt(1, 8), "") == 4
    assert memory.probe(prompt(2, 8), "") == 4
    assert memory.snapshot(0).pages_evicted == 2
    assert len(memory.residents()) == 7


def test_a_request_goes_on_in_its_frame_at_the_cost_of_whoever_ends_there(memory: Memory) -> None:
    memory.cache(prompt(1, 16))  # frames 0 and 1
    memory.cache(prompt(2, 12))  # frame 2 and page 6
    memory.start("c", prompt(3, 4))
    memory.start("d", prompt(4, 16))
    assert memory.pages("c") == [7]
    assert (memory.snapshot(0).kv_frames, memory.snapshot(0).free_pages) == (6, 0)
    # Prefix 1 is the older, but prefix 2 ends beside c.
    assert memory.extend("c", 5)
    assert memory.pages("c") == [7, 6]
    assert (memory.probe(prompt(1, 16), ""), memory.probe(prompt(2, 12), "")) == (16, 8)
    # Nobody ends there any more.
    assert memory.extend("c", 9)
    assert memory.pages("c") == [7, 6, 3]


def test_prefixes_are_spared_when_no_frame_would_come_of_it(memory: Memory) -> None:
    # Every KV frame holds one page of a cached prefix and one of a running request.
    for rid, first in (("a", 1), ("b", 2)):
        memory.admit(rid, prompt(first, 24), "")
    for num_tokens in range(4, 28, 4):
        for rid in ("a", "b"):
            assert memory.extend(rid, num_tokens)
    memory.release("a", prompt(1, 24), 24)
    assert memory.run(0, 0, 1, 2) == [[0, 1], [2]]
    assert memory.probe(prompt(1, 24), "") == 24


@pytest.mark.parametrize("leave", ["close", "exception", "kept"])
def test_an_abandoned_wave_leaves_no_pins(memory: Memory, leave: str) -> None:
    waves = memory.waves(0, (0, 1))
    next(waves)
    if leave == "close":
        waves.close()
    if leave == "exception":
        with pytest.raises(RuntimeError, match="kernel"):
            waves.throw(RuntimeError("kernel"))
    # Even if something (a traceback) keeps the generator, the next layer has all frames.
    memory.start("a", prompt(1, 48))
    assert memory.run(1, 0, 1, 2) == [[0, 1], [2]]


def test_a_kept_wave_that_is_closed_late_does_not_unpin_the_next(memory: Memory) -> None:
    kept = memory.waves(0, (0, 1))
    next(kept)
    current = memory.waves(1, (0, 1))
    next(current)
    kept.close()
    memory.admit("a", prompt(1, 48), "")
    assert memory.extend("a", 48)
    assert memory.residents() == [(1, 0), (1, 1)]
    assert memory.violations() == []


def test_pinned_experts_are_no_memory_for_kv(memory: Memory) -> None:
    waves = memory.waves(0, (0, 1, 2))
    next(waves)
    memory.admit("a", prompt(1, 48), "")
    assert memory.extend("a", 44) is False
    assert memory.extend("a", 40) is True
    assert memory.residents() == [(0, 0), (0, 1), (0, 2)]


def test_a_failed_load_leaves_frames_free_and_can_be_tried_again(memory: Memory) -> None:
    memory.run(0, 0)
    memory.fail_loads = True
    with pytest.raises(OSError, match="the disk is gone"):
        memory.run(0, 0, 1)
    assert memory.violations() == []
    assert memory.residents() == [(0, 0)]
    memory.fail_loads = False
    assert memory.run(0, 0, 1) == [[0, 1]]
    assert memory.snapshot(0).expert_misses == 2


# ---------------------------------------------------------------------------------------- snapshot


def test_snapshot_adds_up(memory: Memory) -> None:
    memory.run(0, 0, 1, 2)
    memory.cache(prompt(1, 12))
    memory.start("a", prompt(1, 13))
    memory.extend("a", 17)  # decoded since: counted as neither hit nor prefill
    snapshot = memory.snapshot(7)
    assert snapshot.step_id == 7
    assert (snapshot.num_frames, snapshot.frame_bytes, snapshot.page_tokens) == (8, 100, 4)
    assert (snapshot.free_frames, snapshot.expert_frames, snapshot.kv_frames) == (2, 3, 3)
    assert (snapshot.total_pages, snapshot.locked_pages, snapshot.cached_pages) == (12, 5, 0)
    assert snapshot.free_pages == 1  # the sixth page of the three frames
    assert snapshot.available_pages == 7
    assert (snapshot.cache_hit_tokens, snapshot.prefill_tokens) == (12, 13)
    assert snapshot.stall_seconds > 0


def test_a_dense_model_has_all_frames_for_kv() -> None:
    geometry = Geometry(
        num_frames=2,
        frame_bytes=100,
        expert_bytes=0,
        page_bytes=50,
        page_tokens=4,
        pages_per_frame=2,
        page_rows=PAGE_ROWS,
    )
    memory = MemoryManager(
        geometry, num_layers=0, num_experts=0, floor_frames=0, load_experts=lambda loads: None
    )
    memory.admit("a", prompt(1, 16), "")
    assert memory.extend("a", 16)
    assert not memory.extend("a", 17)
    assert memory.violations() == []
    assert memory.snapshot(0).total_pages == 4
