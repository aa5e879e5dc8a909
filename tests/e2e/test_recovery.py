"""Workers are killed at every stage while streams run; clients notice nothing but a pause.

Each scenario is a server of its own, in a fork. What it should answer it says itself, while it is left in peace.
"""

import os
import random
import signal
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import forking
import psutil
import pytest
import requests
from checkpoints import VOCAB_SIZE, make_checkpoint
from disturbed_streams import (
    DEADLINE_SECONDS,
    GREEDY,
    NUM_STREAMS,
    Killer,
    Progress,
    Stream,
    ask_all,
    flags_for,
    state_of,
)
from forking import run_in_fork
from mortal_worker import PILL, serve_with_mortal_workers
from serving import Server, running_server

pytestmark = pytest.mark.usefixtures("preloaded")

# Each signal twice, and streams of each kind; 64 streams and 15 kills take seven minutes.
NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]


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
