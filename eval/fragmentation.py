"""How well KV pages lie in frames: what of the prefix cache experts cost that need a frame.

    python -m eval.fragmentation [--output eval/results/fragmentation.json]

A serving mix without a model: clients hold conversations that begin with one of a few shared prompts, their turns are
prefilled in chunks and decoded together, and come back after other clients' turns. Now and then
only a quarter as many run for a while. Every step needs experts by Zipf's law, whose popularity drifts. What decides is
the product's own `MemoryManager`; the arena holds half of the experts and a quarter more than running requests fill. The
same seeds, so the same figures, but for the microseconds.
"""

import argparse
import json
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from eval.page_rules import RULES
from eval.servers import describe_run
from sglmoe.memory.arena import Geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.units import ceil_div

PAGES_PER_FRAME = (1, 3, 6, 24, 168)
CONCURRENCY = (4, 16, 32)
TURNS_PER_ROW = 16  # turns that are served, for each that may run at once
PAGE_TOKENS = 4  # few, so that many pages are decoded in few steps
CHUNK_TOKENS = 64 * PAGE_TOKENS  # of prefill in a step
NUM_LAYERS = 4
MEAN_PAGES = 100  # of a running request, about
STEPS_PER_CENSUS = 16


class Outcome(msgspec.Struct, frozen=True):
    """What a mix came to. Shares are means over censuses."""

    rule: str
    pages_per_frame: int
    concurrency: int
    num_frames: int
    frames_gained: int  # by evicting prefixes for experts
    pages_per_gain: float  # evicted for each of these
    expert_miss_ratio: float
    cached_ratio: float  # of prompt tokens
    free_share: float  # of the pages of KV frames
    mixed_share: float  # of KV frames: pages of more than one node of the tree or running request
    idle_share: float  # of KV frames: no page of a running request
    spread: float  # frames that a running request's pages lie in, for each that they would fill
    preemptions: int
    extend_microseconds: float


class Turn:
    """One request of a conversation."""

    def __init__(self, rid: str, client: "Client", tokens: list[int], num_new: int):
        self.rid = rid
        self.client = client
        self.tokens = tokens
        self.num_prompt = len(tokens)
        self.num_total = len(tokens) + num_new
        self.num_computed = 0

    def token_bytes(self, num_tokens: int) -> bytes:
        return np.array(self.tokens[:num_tokens], np.int32).tobytes()


class Client:
    """A conversation after the other, turn by turn."""

    def __init__(self, number: int, seed: int):
        self._number = number
        self._rng = random.Random(f"{seed} {number}")
        self._tokens: list[int] = []
        self._num_turns = 0

    def next_turn(self) -> Turn:
        rng = self._rng
        if not self._tokens or rng.random() < 0.35 or len(self._tokens) > 320 * PAGE_TOKENS:
            shared = rng.choices(range(4), (8, 4, 2, 1))[0]
            self._tokens = [shared] * ((4 + 4 * shared) * PAGE_TOKENS)
        self._tokens += self._text(min(256, int(rng.lognormvariate(3.0, 1.0)) + 1))
        self._num_turns += 1
        num_new = rng.randrange(2 * PAGE_TOKENS, 32 * PAGE_TOKENS)
        return Turn(f"{self._number}.{self._num_turns}", self, list(self._tokens), num_new)

    def finish(self, turn: Turn) -> None:
        self._tokens = turn.tokens

    def _text(self, num_pages: int) -> list[int]:
        return [self._rng.randrange(1000, 2**31) for _ in range(num_pages * PAGE_TOKENS)]


class Routing:
    """Which experts a step needs: Zipf's law over an order that shifts a little with every step."""

    def __init__(self, num_experts: int, seed: int):
        self._rng = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, num_experts + 1)
        self._shares = weights / weights.sum()
        self._order = np.array([self._rng.permutation(num_experts) for _ in range(NUM_LAYERS)])

    def step(self) -> list[list[int]]:
        num_experts = len(self._shares)
        for order in self._order:
            if self._rng.random() < 0.25:
                moved = self._rng.choice(num_experts, ceil_div(num_experts, 64) + 1, replace=False)
                order[moved] = np.roll(order[moved], 1)
        drawn = self._rng.choice(num_experts, (NUM_LAYERS, num_experts // 2), p=self._shares)
        return [np.unique(self._order[layer][drawn[layer]]).tolist() for layer in range(NUM_LAYERS)]


class Mix:
    """Serves turns until enough have finished."""

    def __init__(self, rule: str, pages_per_frame: int, concurrency: int, *, seed: int = 0):
        self._rule = rule
        self._pages_per_frame = pages_per_frame
        self._concurrency = concurrency
        running_frames = ceil_div(concurrency * MEAN_PAGES, pages_per_frame)
        self._experts = max(8, ceil_div(running_frames, NUM_LAYERS))  # of a layer
        num_frames = running_frames * 5 // 4 + NUM_LAYERS * self._experts // 2
        self._routing = Routing(self._experts, seed)
        self._memory = new_memory(rule, num_frames, pages_per_frame, self._experts)
        self._num_frames = num_frames
        self._idle = [Client(number, seed) for number in range(2 * concurrency)]
        self._queue: deque[Turn] = deque()
        self._rng = random.Random(seed)
        self._running: list[Turn] = []
        self._num_finished = self._num_preempted = 0
        self._gained = Counter[str]()
        self._censuses: list[tuple[float, ...]] = []
        self._num_extends = 0
        self._extend_seconds = 0.0

    def run(self) -> Outcome:
        num_steps = 0
        while self._num_finished < TURNS_PER_ROW * self._concurrency:
            self._step()
            num_steps += 1
            if num_steps % STEPS_PER_CENSUS == 0:
                self._censuses.append(self._census())
        snapshot = self._memory.snapshot(0)
        free_share, mixed_share, idle_share, spread = np.mean(self._censuses, axis=0).tolist()
        needed = snapshot.expert_hits + snapshot.expert_misses
        prompts = snapshot.cache_hit_tokens + snapshot.prefill_tokens
        return Outcome(
            rule=self._rule,
            pages_per_frame=self._pages_per_frame,
            concurrency=self._concurrency,
            num_frames=self._num_frames,
            frames_gained=self._gained["frames"],
            pages_per_gain=self._gained["pages"] / max(1, self._gained["frames"]),
            expert_miss_ratio=snapshot.expert_misses / needed,
            cached_ratio=snapshot.cache_hit_tokens / prompts,
            free_share=free_share,
            mixed_share=mixed_share,
            idle_share=idle_share,
            spread=spread,
            preemptions=self._num_preempted,
            extend_microseconds=self._extend_seconds / self._num_extends * 1e6,
        )

    def _step(self) -> None:
        self._admit()
        rows, budget = [], CHUNK_TOKENS
        for turn in list(self._running):
            if turn not in self._running:
                continue  # preempted for one before it
            if turn.num_computed < turn.num_prompt:
                chunk = min(budget, turn.num_prompt - turn.num_computed)
                budget -= chunk
            else:
                chunk = 1
            if chunk and self._extend(turn, turn.num_computed + chunk):
                rows.append((turn, chunk))
        self._forward()
        for turn, chunk in rows:
            if turn in self._running:
                self._advance(turn, chunk)

    def _admit(self) -> None:
        while self._idle and len(self._running) + len(self._queue) < self._load():
            client = self._idle.pop(self._rng.randrange(len(self._idle)))
            self._queue.append(client.next_turn())
        while self._queue and len(self._running) < self._load():
            turn = self._queue.popleft()
            tokens = turn.token_bytes(len(turn.tokens))
            turn.num_computed = self._memory.admit(turn.rid, tokens, "")
            turn.num_prompt = len(turn.tokens)
            self._running.append(turn)

    def _load(self) -> int:
        """How many run at once: all, then for a while a quarter of them."""
        is_lull = self._num_finished // (2 * self._concurrency) % 2
        return self._concurrency // 4 if is_lull else self._concurrency

    def _extend(self, turn: Turn, num_tokens: int) -> bool:
        """Preempt the youngest until there is memory; False if that was the turn itself."""
        while True:
            started = time.perf_counter()
            fits = self._memory.extend(turn.rid, num_tokens)
            self._extend_seconds += time.perf_counter() - started
            self._num_extends += 1
            if fits:
                return True
            youngest = self._running.pop()
            self._memory.release(
                youngest.rid, youngest.token_bytes(youngest.num_computed), youngest.num_computed
            )
            self._queue.appendleft(youngest)
            self._num_preempted += 1
            if youngest is turn:
                return False

    def _forward(self) -> None:
        before = self._memory.snapshot(0)
        for layer, experts in enumerate(self._routing.step()):
            for _ in self._memory.waves(layer, experts):
                pass
        after = self._memory.snapshot(0)
        self._gained["frames"] += before.kv_frames - after.kv_frames
        self._gained["pages"] += after.pages_evicted - before.pages_evicted

    def _advance(self, turn: Turn, chunk: int) -> None:
        prefills = turn.num_computed < turn.num_prompt
        turn.num_computed += chunk
        if prefills:
            self._memory.commit(turn.rid, turn.token_bytes(turn.num_computed), turn.num_computed)
        if turn.num_computed < turn.num_prompt:
            return
        if len(turn.tokens) < turn.num_total:
            turn.tokens.append(self._rng.randrange(1000, 2**31))
            return
        self._running.remove(turn)
        self._memory.release(turn.rid, turn.token_bytes(turn.num_computed), turn.num_computed)
        turn.client.finish(turn)
        self._idle.append(turn.client)
        self._num_finished += 1

    def _census(self) -> tuple[float, ...]:
        """Free pages and mixed frames, as shares of the KV frames'."""
        owners: dict[int, set[int]] = {}
        num_pages = 0
        for owner, pages in enumerate(owned_pages(self._memory)):
            num_pages += len(pages)
            for page in pages:
                owners.setdefault(page // self._pages_per_frame, set()).add(owner)
        num_mixed = sum(len(its) > 1 for its in owners.values())
        running = [request.pages for request in self._memory._requests.values()]
        frames = [{page // self._pages_per_frame for page in pages} for pages in running]
        least = sum(ceil_div(len(pages), self._pages_per_frame) for pages in running)
        return (
            1 - num_pages / (len(owners) * self._pages_per_frame),
            num_mixed / len(owners),
            1 - len(set().union(*frames)) / len(owners),
            sum(map(len, frames)) / max(1, least),
        )


def new_memory(rule: str, num_frames: int, pages_per_frame: int, num_experts: int) -> MemoryManager:
    geometry = Geometry(
        num_frames=num_frames,
        frame_bytes=pages_per_frame,
        expert_bytes=pages_per_frame,
        page_bytes=1,
        page_tokens=PAGE_TOKENS,
        pages_per_frame=pages_per_frame,
        page_rows=PAGE_TOKENS,
    )
    pool, evictor = RULES[rule]
    with (
        patch("sglmoe.memory.tenants.PagePool", pool),
        patch("sglmoe.memory.tenants.Evictor", evictor),
    ):
        return MemoryManager(
            geometry,
            num_layers=NUM_LAYERS,
            num_experts=num_experts,
            floor_frames=2,
            load_experts=lambda loads: None,
        )


def owned_pages(memory: MemoryManager) -> Iterator[Sequence[int]]:
    """The pages of each node of the tree, and of each running request's own."""
    for node in memory._cache.nodes():
        if node.pages:
            yield node.pages
    for request in memory._requests.values():
        own = request.pages[request.num_tree_pages :]
        if own:
            yield own


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| pages/frame | rows | rule | gained | pages each | expert misses | cached | free | mixed | idle | spread |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for its in outcomes:
        pages = f"{its.pages_per_gain:.1f}" if its.frames_gained else "-"
        lines.append(
            f"| {its.pages_per_frame} | {its.concurrency} | {its.rule} | {its.frames_gained} | {pages} "
            f"| {its.expert_miss_ratio:.2%} | {its.cached_ratio:.1%} | {its.free_share:.1%} "
            f"| {its.mixed_share:.1%} | {its.idle_share:.1%} | {its.spread:.2f} |"
        )
    return "\n".join(lines)


def cells() -> list[tuple[str, int, int]]:
    """What is served: (rule, pages in a frame, requests at once)."""
    return [
        (rule, pages_per_frame, concurrency)
        for pages_per_frame in PAGES_PER_FRAME
        for concurrency in CONCURRENCY
        for rule in RULES
        if rule in ("oldest", "now") or concurrency == 16
    ]


def serve(cell: tuple[str, int, int]) -> Outcome:
    return Mix(*cell).run()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    report: dict[str, Any] = describe_run()
    with ProcessPoolExecutor() as processes:
        outcomes = list(processes.map(serve, cells(), chunksize=1))
    print(table(outcomes))
    if options.output is not None:
        report["outcomes"] = [msgspec.structs.asdict(its) for its in outcomes]
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
