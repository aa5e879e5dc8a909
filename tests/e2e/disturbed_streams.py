"""Streams of all kinds that one server answers at once, and who kills its workers meanwhile. In a fork only."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests
from serving import Server

NUM_EXPERTS, EXPERT_BYTES = 3 * 16, 3 * 64 * 128 * 4
# One of each kind; in the environment, for as long as one likes.
NUM_STREAMS = int(os.environ.get("CHAOS_STREAMS", "8"))
WATCHDOG_SECONDS = 8  # no step takes as long, on however busy a machine
DEADLINE_SECONDS = 60.0

# Long enough for streams to be there still when the last worker is killed.
GREEDY = {"temperature": 0, "max_new_tokens": 320, "ignore_eos": True}
# Both with top_p: SGLang draws otherwise from the same seed while any request beside it has one. And with top_k: its noise
# goes by rank, and of a thousand tokens that a random model finds alike some change ranks with the last bits, which
# depend on who computes beside them.
DRAWN = {**GREEDY, "temperature": 1.0, "top_p": 0.9, "top_k": 20}
KINDS: list[dict[str, Any]] = [
    GREEDY,
    {**DRAWN, "sampling_seed": 11},
    {**GREEDY, "frequency_penalty": 1.7, "presence_penalty": 0.4, "logit_bias": {"77": 16.0}},
    {**GREEDY, "repetition_penalty": 0.3},
    {**GREEDY, "min_new_tokens": 150, "logit_bias": {"1": 50.0}, "ignore_eos": False},
    {**GREEDY, "regex": "[a-f]{90}[0-9]{40}"},
    {**DRAWN, "sampling_seed": 5, "regex": "([a-z]{4} [0-9]{3}, ){20}"},
    {**GREEDY, "json_schema": '{"type": "array", "items": {"type": "integer"}, "minItems": 40}'},
]


class Stream(NamedTuple):
    """What a client got: the text after each event, and the last event's tokens and facts."""

    texts: list[str]
    output_ids: list[int]
    meta: dict[str, Any]


class Progress:
    """Events that have come in over all streams, for whoever wants to kill between them."""

    def __init__(self) -> None:
        self.num_events = 0
        self.num_streams = NUM_STREAMS  # that have not ended
        self._news = threading.Condition()

    def count(self, *, is_last: bool = False) -> None:
        with self._news:
            self.num_events += 1
            self.num_streams -= is_last
            self._news.notify_all()

    def wait_for_more(self, more: int) -> bool:
        """Until so many more have come, or all streams have ended; False when none comes any more."""
        with self._news:
            wanted = self.num_events + more
            return self._news.wait_for(
                lambda: self.num_events >= wanted or not self.num_streams, DEADLINE_SECONDS
            )


def body_of(number: int) -> dict[str, Any]:
    chooser = random.Random(number)
    prompt = [chooser.randrange(5, 1000) for _ in range(chooser.randrange(5, 200))]
    body = {"input_ids": prompt, "sampling_params": KINDS[number % len(KINDS)], "stream": True}
    if number % 3 == 0:
        body |= {"return_logprob": True, "logprob_start_len": 0}
    return body


def stream(url: str, body: dict[str, Any], progress: Progress) -> Stream:
    texts: list[str] = []
    event: dict[str, Any] = {}
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=300) as response:
        assert response.status_code == 200, response.text
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                texts.append(event["text"])
                progress.count()
    progress.count(is_last=True)
    return Stream(texts, event["output_ids"], event["meta_info"])


def ask_all(url: str, disturb: Callable[[Progress], None] = lambda _: None) -> list[Stream]:
    """All streams at once, while `disturb` does its worst."""
    progress = Progress()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asked = [pool.submit(stream, url, body_of(i), progress) for i in range(NUM_STREAMS)]
        disturb(progress)
        return [future.result() for future in asked]


def state_of(server: Server) -> dict[str, Any]:
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    return dict(info["internal_states"][0]["sglmoe"])


class Killer:
    """Kills the workers of one server, and keeps a list."""

    def __init__(self, server: Server, chooser: random.Random) -> None:
        self._server = server
        self._chooser = chooser
        self.waits: list[float] = []  # seconds to the first token after the last death

    def kill(self, number: signal.Signals) -> int:
        pid = int(state_of(self._server)["worker_pid"])
        os.kill(pid, number)
        return pid

    def strike(self, number: signal.Signals, progress: Progress) -> None:
        """Kill at some moment of prefill or decode, and see the streams go on."""
        assert progress.wait_for_more(self._chooser.randrange(1, 60))
        time.sleep(self._chooser.random() * 0.05)
        before = state_of(self._server)["restarts"]["count"]
        self.kill(number)
        self.wait_until_served(before, progress)

    def strike_while_loading(self, progress: Progress) -> None:
        """Kill a worker, and its successor before that is ready."""
        assert progress.wait_for_more(20)
        before = state_of(self._server)["restarts"]["count"]
        victim = psutil.Process(self.kill(signal.SIGKILL))
        successor = wait_for_successor(victim)
        time.sleep(self._chooser.random() * 0.4)
        successor.kill()
        self.wait_until_served(before, progress)

    def strike_again_at_once(self, progress: Progress) -> None:
        """Kill a worker, and its successor while that compiles grammars or computes prompts again."""
        assert progress.wait_for_more(20)
        before = state_of(self._server)["restarts"]["count"]
        self.kill(signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while state_of(self._server)["restarts"]["count"] == before:
            assert time.monotonic() < deadline
        time.sleep(self._chooser.random() * 0.1)
        self.kill(signal.SIGKILL)
        self.wait_until_served(before + 1, progress)

    def wait_until_served(self, before: int, progress: Progress) -> None:
        """By another worker; if no stream is left to serve, until there is one."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            restarts = state_of(self._server)["restarts"]
            if restarts["count"] > before and restarts["token_seconds"]:
                self.waits.append(restarts["token_seconds"])
                return
            if restarts["count"] > before and not progress.num_streams:
                return
            time.sleep(0.05)
        raise AssertionError(f"no token came any more: {restarts}")


def wait_for_successor(victim: psutil.Process) -> psutil.Process:
    """The fork server's next child: workers are all that it starts by then."""
    fork_server, died_at = victim.parent(), time.time()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        newest = max(fork_server.children(), key=lambda process: process.create_time())
        if newest.pid != victim.pid and newest.create_time() > died_at - 0.5:
            return newest
        time.sleep(0.01)
    raise AssertionError("no other worker was started")


def flags_for(model_dir: Path) -> list[str]:
    """Memory for half of the experts, and for less KV than the streams need."""
    file_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    return [
        f"--model-path={model_dir}",
        "--dtype=float32",
        f"--memory-budget={file_bytes - NUM_EXPERTS // 2 * EXPERT_BYTES}",
        "--max-running-requests=16",
        "--chunked-prefill-size=64",
        "--random-seed=0",
        f"--watchdog-timeout={WATCHDOG_SECONDS}",
        "--shutdown-timeout=1",
        "--enable-metrics",
    ]
