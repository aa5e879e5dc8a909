"""Workers are killed at every stage while streams run; clients notice nothing but a pause.

Each scenario is a server of its own, in a fork. What it should answer it says itself, while it is left in peace.
"""

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import forking
import psutil
import pytest
import requests
from checkpoints import VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from mortal_worker import PILL, serve_with_mortal_workers
from serving import Server, running_server

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_EXPERTS, EXPERT_BYTES = 3 * 16, 3 * 64 * 128 * 4
# One of each kind, and each signal twice; in the environment, for as long as one likes: 64 and 15 take seven minutes.
NUM_STREAMS = int(os.environ.get("CHAOS_STREAMS", "8"))
NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]
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


def ask_in_peace(url: str) -> list[Stream]:
    """What the server answers when nothing happens to it."""
    calm = ask_all(url)
    assert {answer.meta["finish_reason"]["type"] for answer in calm} <= {"stop", "length"}
    return calm


def check_same(disturbed: list[Stream], calm: list[Stream]) -> None:
    for got, expected in zip(disturbed, calm, strict=True):
        assert got.output_ids == expected.output_ids
        assert got.texts[-1] == expected.texts[-1]
        assert all(longer.startswith(text) for text, longer in pairwise(got.texts))
        assert got.meta["finish_reason"] == expected.meta["finish_reason"]
        assert got.meta["completion_tokens"] == len(got.output_ids)
        for name in ("input_token_logprobs", "output_token_logprobs"):
            check_logprobs(got.meta.get(name, []), expected.meta.get(name, []))


def check_logprobs(got: list[Any], expected: list[Any]) -> None:
    """One a token; a prefill and a decode step may differ in the last bits."""
    assert [token_id for _, token_id, _ in got] == [token_id for _, token_id, _ in expected]
    for (value, *_), (wanted, *_) in zip(got, expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted, abs=1e-3))


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


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    return run_in_fork(
        make_checkpoint,
        "qwen3_moe",
        tmp_path_factory.mktemp("recovery"),
        dtype="float32",
        attention_gain=1.0,
    )


def socket_directories() -> set[Path]:
    """Those of this machine's scheduler processes: `transport.make_socket_directory`."""
    return {path.parent for path in Path(tempfile.gettempdir()).glob("sglmoe-*/plans")}


def check_none_left(before: set[Path]) -> None:
    """No more directories of sockets than before; those of others come and go."""
    deadline = time.monotonic() + 10
    while left := socket_directories() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------------------- chaos


def cause_chaos(model_dir: Path, log: Path, seed: int) -> list[float]:
    chooser = random.Random(seed)
    with running_server(
        "sglmoe.launch_server", *flags_for(model_dir), log=log, prepare=serve_with_mortal_workers
    ) as server:
        killer = Killer(server, chooser)
        calm = ask_in_peace(server.url)

        def kill_often(progress: Progress) -> None:
            for number in chooser.sample(SIGNALS * (NUM_KILLS // len(SIGNALS)), NUM_KILLS):
                killer.strike(number, progress)

        def kill_thoroughly(progress: Progress) -> None:
            killer.strike_while_loading(progress)
            killer.strike(signal.SIGSTOP, progress)
            killer.strike_again_at_once(progress)
            killer.strike_while_loading(progress)

        for disturb in (kill_often, kill_thoroughly):
            check_same(ask_all(server.url, disturb), calm)
            assert requests.post(f"{server.url}/flush_cache", timeout=60).ok
        killer.kill(signal.SIGKILL)  # with nothing to do
        check_same(ask_all(server.url), calm)
        restarts = state_of(server)["restarts"]
        assert restarts["count"] >= NUM_KILLS + 6
        assert len(killer.waits) == NUM_KILLS + 4, "a worker was killed when all streams had ended"
        assert restarts["failed_requests"] == 0
        metrics = requests.get(f"{server.url}/metrics", timeout=60).text
        assert any(
            line.startswith("sglmoe_worker_restarts_total")
            and float(line.split()[-1]) == restarts["count"]
            for line in metrics.splitlines()
        )
        return killer.waits


def test_streams_go_on_whenever_workers_are_killed(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forking, "TIMEOUT_SECONDS", forking.TIMEOUT_SECONDS * NUM_STREAMS / 8)
    before = socket_directories()
    waits = sorted(run_in_fork(cause_chaos, model_dir, tmp_path / "log", 1))
    print(f"seconds from the loss of a worker to the next token: {waits}")
    check_none_left(before)


# --------------------------------------------------------------------------------------------------------- poison pill


def swallow_pill(model_dir: Path, log: Path) -> None:
    with running_server(
        "sglmoe.launch_server", *flags_for(model_dir), log=log, prepare=serve_with_mortal_workers
    ) as server:
        calm = ask_in_peace(server.url)
        answers: list[requests.Response] = []

        def give_pill(progress: Progress) -> None:
            assert progress.wait_for_more(100)
            body = {"input_ids": [7, 8, PILL], "sampling_params": GREEDY}
            answers.append(requests.post(f"{server.url}/generate", json=body, timeout=120))

        check_same(ask_all(server.url, give_pill), calm)
        assert answers[0].status_code == 500
        assert "died 3 times in a row" in answers[0].text
        assert "SIGSEGV" in answers[0].text
        restarts = state_of(server)["restarts"]
        assert (restarts["count"], restarts["failed_requests"]) == (3, 1)
        assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
        stop_with_a_stopped_worker(server, calm)


def stop_with_a_stopped_worker(server: Server, calm: list[Stream]) -> None:
    """Nothing can finish any more: what there is is handed back, and no process stays."""

    def stop(progress: Progress) -> None:
        assert progress.wait_for_more(100)
        Killer(server, random.Random(0)).kill(signal.SIGSTOP)
        server.process.terminate()

    worker = psutil.Process(state_of(server)["worker_pid"])
    for got, expected in zip(ask_all(server.url, stop), calm, strict=True):
        assert got.output_ids == expected.output_ids[: len(got.output_ids)]
        if len(got.output_ids) < len(expected.output_ids):
            assert got.meta["finish_reason"]["type"] == "abort"
    server.process.join(DEADLINE_SECONDS)
    assert server.poll() == 0
    worker.wait(DEADLINE_SECONDS)


def test_a_request_that_kills_workers_is_failed_and_no_other(
    model_dir: Path, tmp_path: Path
) -> None:
    """And, on the same server, SIGTERM."""
    assert PILL < VOCAB_SIZE
    run_in_fork(swallow_pill, model_dir, tmp_path / "log")


# ------------------------------------------------------------------------------------------------- the truth, and ends


def lose_patience() -> None:
    """What SGLANG_HEALTH_CHECK_TIMEOUT does, which was read when the session imported SGLang."""
    from sglang.srt.entrypoints import http_server

    http_server.HEALTH_CHECK_TIMEOUT = 3


def watch_health(model_dir: Path, log: Path) -> None:
    with running_server(
        "sglmoe.launch_server", *flags_for(model_dir), log=log, prepare=lose_patience
    ) as server:
        killer = Killer(server, random.Random(0))

        def ask_how_it_is(progress: Progress) -> None:
            assert progress.wait_for_more(20)
            assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
            killer.kill(signal.SIGSTOP)
            time.sleep(0.5)  # what was on its way arrives
            assert requests.get(f"{server.url}/health", timeout=60).status_code == 503
            killer.wait_until_served(0, progress)
            assert requests.get(f"{server.url}/health", timeout=60).status_code == 200

        ask_all(server.url, ask_how_it_is)
        # Now no worker can load any more.
        file = model_dir / "model.safetensors"
        whole = file.read_bytes()
        with file.open("r+b") as open_file:
            open_file.truncate(len(whole) // 4)
        try:
            # Scheduler, detokenizer and worker are the fork server's.
            worker = psutil.Process(state_of(server)["worker_pid"])
            processes = worker.parent().children()
            killer.kill(signal.SIGKILL)
            server.process.join(DEADLINE_SECONDS)
        finally:
            file.write_bytes(whole)
        assert server.poll() not in (None, 0)
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE_SECONDS)
        assert alive == []


def test_health_tells_the_truth_and_the_server_ends_when_no_worker_can_start(
    model_dir: Path, tmp_path: Path
) -> None:
    before = socket_directories()
    run_in_fork(watch_health, model_dir, tmp_path / "log")
    check_none_left(before)
