"""Steps that begin behind others in a server whose workers die, whose clients leave, and to which others come."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from checkpoints import make_checkpoint
from disturbed_streams import GREEDY, Killer, Progress, Stream, flags_for, state_of, stream
from following_worker import serve_with_following_workers
from forking import run_in_fork
from serving import running_server

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_STREAMS = 3
NUM_KILLS = 3


def body_of(number: int, num_tokens: int = 120) -> dict[str, Any]:
    chooser = random.Random(number)
    prompt = [chooser.randrange(5, 1000) for _ in range(20 + 7 * number)]
    return {
        "input_ids": prompt,
        "sampling_params": GREEDY | {"max_new_tokens": num_tokens},
        "stream": True,
        "return_logprob": number == 0,
    }


def leave(url: str) -> None:
    """A client that goes away in the middle of its answer."""
    with requests.post(f"{url}/generate", json=body_of(7), stream=True, timeout=60) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 9:
                return


def ask_all(url: str, disturb: Any = lambda _: None) -> list[Stream]:
    progress = Progress()
    progress.num_streams = NUM_STREAMS
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asked = [pool.submit(stream, url, body_of(i), progress) for i in range(NUM_STREAMS)]
        disturb(progress)
        return [future.result() for future in asked]


def serve(model_dir: Path, log: Path) -> tuple[list[list[Stream]], dict[str, Any], dict[str, Any]]:
    """Answers in peace, beside clients who come and go, and while workers are killed; the state in between and in the end."""
    flags = [its for its in flags_for(model_dir) if not its.startswith("--memory-budget")]
    flags += ["--memory-budget=200MB", "--host-memory=8MB"]
    module = "sglmoe.launch_server"
    with running_server(module, *flags, log=log, prepare=serve_with_following_workers) as server:
        killer = Killer(server, random.Random(5))

        def come_and_go(progress: Progress) -> None:
            for _ in range(3):
                assert progress.wait_for_more(20)
                leave(server.url)

        def kill(progress: Progress) -> None:
            for _ in range(NUM_KILLS):
                killer.strike(signal.SIGKILL, progress)

        answers = [ask_all(server.url), ask_all(server.url, come_and_go)]
        before = state_of(server)
        answers.append(ask_all(server.url, kill))
        return answers, before, state_of(server)


def test_nothing_is_lost_with_a_step_that_has_begun_behind_another(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    model_dir = run_in_fork(
        make_checkpoint,
        "qwen3_moe",
        tmp_path_factory.mktemp("following"),
        dtype="float32",
        attention_gain=1.0,
    )
    answers, before, after = run_in_fork(serve, model_dir, tmp_path / "log")
    calm, *disturbed = ([its.output_ids for its in streams] for streams in answers)
    assert [len(ids) for ids in calm] == [120] * NUM_STREAMS
    assert disturbed == [calm, calm]
    assert before["memory"]["followed_steps"] > 100
    assert after["memory"]["followed_steps"] > 0  # of the last worker
    assert after["restarts"]["count"] == NUM_KILLS
    assert after["restarts"]["failed_requests"] == 0
