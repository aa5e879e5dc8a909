"""What one question of the live view costs: drawn, sent and written for a model of any size, without one.

    python -m eval.live_view_cost                                # 48 layers of 128 experts, 3,000 frames
    python -m eval.live_view_cost --url http://127.0.0.1:30000   # CPU time of a running server's processes (no GPU)

The page asks 2.5 times a second.
"""

import argparse
import time
import urllib.request
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import psutil

from sglmoe.config import MemoryPolicy
from sglmoe.live_view.state import Counters, LiveState, Memory, Prefetch, Requests, WorkerState
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.protocol import CallDone, FromWorker, MemoryMap
from sglmoe.scheduler.live_state import drawn_map, fields_of

REPEATS = 200
QUESTIONS = 100
TOKENS_PER_REQUEST = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--url", help="A running server, to be asked instead.")
    options = parser.parse_args()
    if options.url:
        ask_server(options.url)
    else:
        measure(used_memory(options.frames, options.layers, options.experts))


def used_memory(num_frames: int, num_layers: int, num_experts: int) -> MemoryManager:
    """A third of the frames with KV, the others with experts, after a few steps."""
    geometry = Geometry(
        num_frames=num_frames,
        frame_bytes=9 << 20,
        expert_bytes=9 << 20,
        page_bytes=3 << 19,
        page_tokens=16,
        pages_per_frame=6,
        page_rows=2 * num_layers * 16,
    )
    memory = MemoryManager(
        geometry,
        num_layers=num_layers,
        num_experts=num_experts,
        floor_frames=8,
        load_experts=load_nothing,
        policy=MemoryPolicy.COST_AWARE,
    )
    chooser = np.random.default_rng(0)
    kv_tokens = num_frames // 3 * geometry.pages_per_frame * geometry.page_tokens
    for number in range(kv_tokens // TOKENS_PER_REQUEST):
        tokens = np.full(TOKENS_PER_REQUEST, number, np.int32).tobytes()
        memory.admit(str(number), tokens, "")
        memory.extend(str(number), TOKENS_PER_REQUEST)
        if number % 2:
            memory.release(str(number), tokens, TOKENS_PER_REQUEST)
    for _ in range(4):
        memory.begin_step()
        for layer in range(num_layers):
            chosen = chooser.choice(num_experts, size=num_experts // 2, replace=False)
            for _ in memory.waves(layer, chosen):
                pass
    return memory


def load_nothing(loads: Sequence[Load]) -> None:
    """Bytes do not matter here."""


def measure(memory: MemoryManager) -> None:
    in_host = np.zeros(memory.frame_table.shape, np.bool_)
    drawn = memory.draw(in_host)
    done = CallDone(0, success=True, memory=drawn)
    message = msgspec.msgpack.encode(done)
    state = state_of(memory, drawn)
    answer = msgspec.json.encode(state)
    decoder = msgspec.msgpack.Decoder(FromWorker)
    print(f"{len(drawn.frames)} frames, {len(drawn.heat)} layers of {len(drawn.heat[0])} experts")
    print(f"worker:    draw {show(lambda: memory.draw(in_host))}, ", end="")
    print(f"encode {show(lambda: msgspec.msgpack.encode(done))}, {len(message)} bytes")
    print(f"scheduler: decode {show(lambda: decoder.decode(message))}, ", end="")
    print(f"make and encode {show(lambda: msgspec.json.encode(state_of(memory, drawn)))}")
    print(f"browser:   {len(answer)} bytes of JSON")


def state_of(memory: MemoryManager, drawn: MemoryMap) -> LiveState:
    """As the scheduler makes it, with made-up facts that memory does not know."""
    snapshot = memory.snapshot(0)
    return LiveState(
        model="none",
        uptime_seconds=1.0,
        worker=WorkerState("running", 1, 0, 0, "", 0.0, 0.0),
        requests=Requests(8, 0, 0, 256, False),
        memory=Memory(dense_bytes=0, expert_bytes=0, **fields_of(snapshot, Memory)),
        counters=Counters(**fields_of(snapshot, Counters)),
        prefetch=Prefetch("off", False, "", None, None),
        rates=None,
        map=drawn_map(drawn, age_seconds=0.1),
    )


def show(function: Callable[[], object]) -> str:
    """The median time of a call."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return f"{1e6 * sorted(times)[REPEATS // 2]:.0f} us"


def ask_server(url: str) -> None:
    """Ask as fast as answers are made anew, and see whose CPU time grows by what."""
    address = f"{url.rstrip('/')}/sglmoe/state"
    worker = psutil.Process(msgspec.json.decode(ask(address))["worker"]["pid"])
    fork_server = worker.parent()
    scheduler = min(fork_server.children(), key=lambda process: process.create_time())
    processes = {"HTTP server": fork_server.parent(), "scheduler": scheduler, "worker": worker}
    asked = cpu_times(processes, lambda: ask(address))
    left_alone = cpu_times(processes, lambda: b"")
    for name in processes:
        print(f"{name}: {1000 * (asked[name] - left_alone[name]) / QUESTIONS:.2f} ms a question")
    print(f"{len(ask(address))} bytes of JSON")


def cpu_times(
    processes: dict[str, psutil.Process], question: Callable[[], bytes]
) -> dict[str, float]:
    """Seconds by process that `QUESTIONS` questions take, 0.3 s apart."""
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    for _ in range(QUESTIONS):
        question()
        time.sleep(0.3)
    return {
        name: sum(process.cpu_times()[:2]) - before[name] for name, process in processes.items()
    }


def ask(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as response:
        return bytes(response.read())


if __name__ == "__main__":
    main()
