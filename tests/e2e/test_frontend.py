"""SGLang's HTTP server, tokenizer manager and detokenizer over our scheduler and a fake worker.

The fake worker's tokens count up from 300, so that every answer is known.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from checkpoints import make_checkpoint
from fake_worker import DEAFEN_TOKEN, FIRST_TOKEN, KILL_TOKEN, LEAVES, LIMITS
from forking import run_in_fork

START_SECONDS = 240


class Server:
    """A running `fake_server.py`."""

    def __init__(self, model_dir: Path, log: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = Path(__file__).with_name("fake_server.py")
        command = [sys.executable, str(script), "--model-path", str(model_dir), "--device", "cpu"]
        self.log = log
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        deadline = time.monotonic() + START_SECONDS
        while "fired up" not in log.read_text():
            assert self.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def generate(self, **body: Any) -> Any:
        response = self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        with self.client.stream("POST", "/generate", json=body | {"stream": True}) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_fork(make_checkpoint, "qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ["--enable-metrics", "--decode-log-interval", "4", "--watchdog-timeout", "4"]
    server = Server(model_dir, log, *flags)
    yield server
    server.stop()


def tokens(num: int) -> list[int]:
    return [FIRST_TOKEN + i % 100 for i in range(num)]


def test_single_batch_and_parallel_samples(server: Server) -> None:
    sampling = {"max_new_tokens": 8}
    one = server.generate(text="hello", sampling_params=sampling)
    assert one["output_ids"] == tokens(8)
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert one["meta_info"]["completion_tokens"] == 8
    two = server.generate(text=["hello", "a longer one"], sampling_params=sampling)
    assert [answer["output_ids"] for answer in two] == [tokens(8)] * 2
    three = server.generate(text="hello", sampling_params=sampling | {"n": 3})
    assert [answer["text"] for answer in three] == [one["text"]] * 3


def test_more_requests_than_may_run(server: Server) -> None:
    prompts = [[5, 6, 7 + i] for i in range(3 * LIMITS.max_running)]
    answers = server.generate(input_ids=prompts, sampling_params={"max_new_tokens": 20})
    assert all(answer["output_ids"] == tokens(20) for answer in answers)


def test_stream_says_the_same_as_the_whole(server: Server) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 30}}
    chunks = server.stream(**body)
    assert len(chunks) > 5
    assert chunks[-1]["text"] == server.generate(**body)["text"]
    texts = [chunk["text"] for chunk in chunks]
    assert all(longer.startswith(text) for text, longer in pairwise(texts))


def test_stop_string_is_trimmed_and_never_streamed(server: Server) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 40}}
    text = server.generate(**body)["text"]
    stop = text[10:16]
    assert (
        text[:17] == " self # pstringle"
    )  # tokens: " p", "string", "le": it begins and ends inside one
    body["sampling_params"]["stop"] = stop
    stopped = server.generate(**body)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    chunks = server.stream(**body)
    assert chunks[-1]["text"] == stopped["text"]
    # Not even its beginning: what was streamed can't be taken back.
    assert all(stopped["text"].startswith(chunk["text"]) for chunk in chunks)


def test_stop_token_and_nothing_to_generate(server: Server) -> None:
    sampling = {"max_new_tokens": 40, "stop_token_ids": [FIRST_TOKEN + 3]}
    stopped = server.generate(input_ids=[5, 6, 7], sampling_params=sampling)
    assert stopped["output_ids"] == tokens(4)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": FIRST_TOKEN + 3}
    nothing = server.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 0})
    assert nothing["output_ids"] == []
    assert nothing["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_logprobs(server: Server) -> None:
    answer = server.generate(
        input_ids=[5, 6, 7, 8],
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=2,
        token_ids_logprob=[11, 12],
    )["meta_info"]
    assert [entry[:2] for entry in answer["input_token_logprobs"]] == [
        [None, 6],
        [-0.007, 7],
        [-0.008, 8],
    ]
    assert [entry[:2] for entry in answer["output_token_logprobs"]] == [[-0.3, 300], [-0.301, 301]]
    assert answer["input_top_logprobs"][0] is None
    assert [entry[:2] for entry in answer["input_top_logprobs"][1]] == [[-0.1, 400], [-0.2, 401]]
    assert [entry[:2] for entry in answer["output_token_ids_logprobs"][1]] == [
        [-2.0, 11],
        [-2.0, 12],
    ]
    streamed = server.stream(
        input_ids=[5, 6], sampling_params={"max_new_tokens": 6}, return_logprob=True
    )
    assert len(streamed[-1]["meta_info"]["output_token_logprobs"]) == 6


def test_routed_experts_of_all_tokens_but_the_last(server: Server) -> None:
    answer = server.generate(
        input_ids=[5, 6, 7, 8],
        sampling_params={"max_new_tokens": 3},
        return_routed_experts=True,
    )
    encoded = base64.b64decode(answer["meta_info"]["routed_experts"])
    per_token = 4 * 2 * 3
    firsts = [
        int.from_bytes(encoded[i : i + 4], "little") for i in range(0, len(encoded), per_token)
    ]
    assert firsts == [0, 1, 2, 3, 4, 5]


def test_chat_completion(server: Server) -> None:
    response = server.client.post(
        "/v1/chat/completions",
        json={"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    )
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_ids": [5, 5000]}, "outside of the vocabulary of 1024"),
        ({"input_ids": [5] * 1999}, "--memory-budget"),
        ({"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 1990}}, "2000 tokens"),
        ({"input_ids": [5], "sampling_params": {"beam_width": 2}}, "beam"),
        ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"regex": "(unclosed"}}, "grammar"),
    ],
)
def test_bad_requests_are_refused(server: Server, body: dict[str, Any], says: str) -> None:
    response = server.client.post("/generate", json=body)
    assert response.status_code == 400, response.text
    assert says in response.text


def test_abort_running_and_health_while_busy(server: Server) -> None:
    answers: list[httpx.Response] = []
    body = {"input_ids": [5, 6], "rid": "long", "sampling_params": {"max_new_tokens": 1900}}
    thread = threading.Thread(
        target=lambda: answers.append(server.client.post("/generate", json=body))
    )
    thread.start()
    time.sleep(0.5)
    assert server.client.get("/health_generate").status_code == 200
    assert not server.client.post("/flush_cache").is_success
    state = server.client.get("/server_info").json()["internal_states"][0]
    assert state["sglmoe"]["running_requests"] == 1
    assert state["sglmoe"]["memory"]["expert_frames"] == 50
    assert state["sglmoe"]["plan"]["reason"] == "no plan was made"
    assert state["sglmoe"]["running_limit"] == 16
    assert state["sglmoe"]["totals"]["decoded_tokens"] > 0
    server.client.post("/abort_request", json={"rid": "long"})
    thread.join(timeout=10)
    reason = answers[0].json()["meta_info"]["finish_reason"]
    assert reason["type"] == "abort"
    assert server.client.post("/flush_cache").is_success


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_and_continue(server: Server, mode: str) -> None:
    answers: list[Any] = []
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 200}}
    thread = threading.Thread(target=lambda: answers.append(server.generate(**body)))
    thread.start()
    time.sleep(0.4)
    server.client.post("/pause_generation", json={"mode": mode})
    time.sleep(1.5)
    assert not answers
    assert server.client.post("/flush_cache").is_success == (mode == "retract")
    server.client.post("/continue_generation", json={})
    thread.join(timeout=20)
    assert answers[0]["output_ids"] == tokens(200)
    assert answers[0]["meta_info"]["num_retractions"] == (mode == "retract")


def test_unsupported_endpoints_answer(server: Server) -> None:
    response = server.client.post(
        "/update_weights_from_disk", json={"model_path": "/nowhere"}, timeout=10
    )
    assert response.json()["success"] is False
    assert "restart" in response.json()["message"]
    assert server.client.post("/release_memory_occupation", json={}, timeout=10).is_success
    assert server.client.post("/open_session", json={"capacity_of_str_len": 10}, timeout=10)
    assert server.client.post("/slow_down", json={"forward_sleep_time": None}, timeout=10)
    assert server.client.post("/start_profile", json={}, timeout=10).is_success
    assert server.client.post("/stop_profile", timeout=10).is_success


def test_metrics_and_loads(server: Server) -> None:
    server.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 20})
    metrics = server.client.get("/metrics/").text
    for name in (
        "sglang:num_running_reqs",
        "sglang:gen_throughput",
        "sglang:token_usage",
        "sglang:realtime_tokens_total",
        "sglang:queue_time_seconds",
        "sglmoe_expert_frames",
        "sglmoe_free_pages",
        "sglmoe_expert_misses_total",
        "sglmoe_stall_seconds_total",
        "sglmoe_running_limit",
        "sglmoe_target_expert_frames",
        "sglmoe_predicted_step_seconds",
        "sglmoe_pass_stream_seconds",
        "sglmoe_full_pass_tokens",
        "sglmoe_prefill_passes_total",
        "sglmoe_held_passes_total",
        "sglmoe_held_seconds_total",
        "sglmoe_out_of_turn_total",
    ):
        assert name in metrics
    loads = server.client.get("/v1/loads").json()["loads"]
    assert loads[0]["max_total_num_tokens"] == LIMITS.total_tokens


def start_long_answer(server: Server) -> "Future[httpx.Response]":
    """600 tokens of it, the first of which have come."""
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 600}}
    executor = ThreadPoolExecutor(1)
    answer = executor.submit(server.client.post, "/generate", json=body)
    executor.shutdown(wait=False)
    time.sleep(0.4)
    return answer


def test_workers_that_die_of_a_request_fail_it_alone(server: Server) -> None:
    answer = start_long_answer(server)
    killer = server.client.post("/generate", json={"input_ids": [5, KILL_TOKEN]})
    assert killer.status_code == 500
    assert "killed by SIGKILL, probably out of memory; lower --memory-budget" in killer.text
    assert answer.result(timeout=20).json()["output_ids"] == tokens(600)
    state = server.client.get("/server_info").json()["internal_states"][0]["sglmoe"]
    assert (state["restarts"]["count"], state["restarts"]["failed_requests"]) == (3, 1)
    assert "sglmoe_worker_restarts_total{" in server.client.get("/metrics/").text


def test_a_worker_that_closes_its_sockets_is_replaced(server: Server) -> None:
    """It lives on, and would never be heard of again."""
    before = server.client.get("/server_info").json()["internal_states"][0]["sglmoe"]["restarts"]
    assert server.generate(input_ids=[5, DEAFEN_TOKEN], sampling_params={"max_new_tokens": 8})[
        "output_ids"
    ] == tokens(8)
    state = server.client.get("/server_info").json()["internal_states"][0]["sglmoe"]
    assert state["restarts"]["count"] == before["count"] + 1
    assert "made no progress for 4 s" in state["restarts"]["cause"]


def test_sglang_knows_the_scheduler_by_its_title(server: Server) -> None:
    """At SIGTERM its launcher waits for whom it knows, and kills the others at once."""
    from sglang.srt.utils.cudacore_pyspy_dump_utils import _is_sglang_scheduler_process

    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len([child for child in children if _is_sglang_scheduler_process(child)]) == 1


def test_sigterm_lets_requests_finish_and_processes_leave(server: Server) -> None:
    """Last, because the server does not survive it."""
    answer = start_long_answer(server)
    log_before = server.log.read_text()
    server.process.terminate()
    assert answer.result(timeout=20).json()["output_ids"] == tokens(600)
    assert server.process.wait(timeout=40) == 0
    assert LEAVES in server.log.read_text().removeprefix(log_before)
