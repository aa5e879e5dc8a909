"""A server under mixed load for half an hour: does anything grow that should not?

    python -m eval.soak --model-path MODEL --minutes 30 --output eval/results/soak-NAME

`--clients` ask without pause, each time something else: a chat that is streamed, a long prompt that shares its
beginning with others, a JSON schema, stop strings, log probabilities, several answers to one prompt, a stream that
is left after a few tokens, and a request that is refused. Every answer is checked for its kind; the same greedy prompt
comes back again and again and is compared with its first answer. Every `--interval` seconds: memory, open files and
threads of each of the server's processes, frames by kind, running and waiting requests.

Written: what was found (`soak.json`), samples (`samples.json.xz`) and a plot. Exits with 1 if a request was lost or
wrong, if anything is left when all is quiet, or if files or memory go on growing.
"""

import argparse
import contextlib
import http.client
import io
import json
import lzma
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from tqdm import tqdm

from eval.servers import OURS, Server, describe_run, running
from sglmoe.demo_model import DEMO_MODEL

WARM_UP_SHARE = 1 / 3  # of the samples, in which caches and allocators fill
# A process may grow by so much in an hour, fitted over the samples after the warm-up: what noise and caches come to.
MAX_GROWTH_MIB_PER_HOUR = 32.0
MAX_GROWTH_FILES_PER_HOUR = 8.0
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
)
TOPICS = ("the sea", "a compiler", "winter", "an old bridge", "bread", "the moon", "trains", "ants")
COMMON = "You are a careful librarian who answers in short sentences. " * 24


class Wrong(Exception):
    """An answer that is not what was asked for."""


class Usage(NamedTuple):
    """Of one process. What a child shares with the fork server becomes its own, a page at a time, when it is written to:
    in `anonymous_mib` it was counted before, so that this grows by what is new alone."""

    own_mib: float  # unique set size
    files: int
    threads: int
    anonymous_mib: float  # resident and of no file, shared or not


class Sample(NamedTuple):
    seconds: float
    processes: dict[str, Usage]  # by role
    frames: tuple[int, int, int]  # experts, KV, free
    num_running: int
    num_queued: int
    num_done: int


class Client:
    """One thread that asks; `counts` by kind, and what went wrong."""

    def __init__(self, server: Server, number: int, firsts: dict[str, str], deadline: float):
        self._server = server
        self._rng = random.Random(number)
        self._firsts = firsts  # the first answer to each greedy prompt, shared by all clients
        self._deadline = deadline
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.num_changed = 0  # greedy answers that differ from the first: batches of another size
        self.thread = threading.Thread(target=self._run, name=f"client-{number}", daemon=True)

    def _run(self) -> None:
        kinds: Sequence[Callable[[], None]] = (
            self.chat,
            self.shared_prefix,
            self.schema,
            self.stop_strings,
            self.logprobs,
            self.several,
            self.left_alone,
            self.refused,
        )
        while time.monotonic() < self._deadline:
            ask = self._rng.choice(kinds)
            try:
                ask()
            except Exception as error:
                self.problems.append(f"{ask.__name__}: {error!r}")
            self.counts[ask.__name__] += 1

    # ------------------------------------------------------------------------------------------------ kinds of requests

    def chat(self) -> None:
        with self._stream("/v1/chat/completions", self._chat_body()) as response:
            lines = [line for line in response if line.startswith(b"data: ")]
        expect(lines[-1].strip() == b"data: [DONE]", "the stream ends with [DONE]", lines[-1:])
        last = json.loads(lines[-2].removeprefix(b"data: "))
        reason = last["choices"][0]["finish_reason"]
        expect(reason in ("stop", "length"), "a reason at the end", last)

    def shared_prefix(self) -> None:
        topic = self._rng.choice(TOPICS)
        text = self._generate(COMMON + f"Tell me of {topic}.", max_new_tokens=24)["text"]
        first = self._firsts.setdefault(topic, text)
        self.num_changed += first != text

    def schema(self) -> None:
        body = self._generate("A person:", max_new_tokens=200, temperature=0.7, json_schema=SCHEMA)
        if body["meta_info"]["finish_reason"]["type"] == "stop":
            expect(set(json.loads(body["text"])) == {"name", "age"}, "JSON of the schema", body)

    def stop_strings(self) -> None:
        body = self._generate("Count: one, two,", max_new_tokens=64, stop=[",", "\n", "."])
        expect(not set(",\n.") & set(body["text"]), "no stop string in the text", body)

    def logprobs(self) -> None:
        body = self._generate(
            "The answer is", max_new_tokens=8, ignore_eos=True, return_logprob=True, logprob_start=0
        )
        expect(len(body["meta_info"]["output_token_logprobs"]) == 8, "a logprob a token", body)

    def several(self) -> None:
        answers = self._generate("Once", max_new_tokens=12, temperature=1.0, n=3)
        expect(len(answers) == 3, "three answers", answers)

    def left_alone(self) -> None:
        body = self._chat_body() | {"max_tokens": 400, "ignore_eos": True}
        with self._stream("/v1/chat/completions", body) as response:
            for _ in range(self._rng.randrange(1, 12)):
                response.readline()

    def refused(self) -> None:
        wrong = self._rng.choice(
            ({"temperature": -1}, {"max_new_tokens": 10**9}, {"json_schema": "{"}, {"top_p": 7})
        )
        try:
            self._generate("Hello", **wrong)
        except RuntimeError as error:
            expect(" 400 " in str(error), "a refusal is a 400", str(error))
        else:
            raise Wrong(f"{wrong} was not refused")

    # ----------------------------------------------------------------------------------------------------------- how

    def _chat_body(self) -> dict[str, Any]:
        question = f"Say something of {self._rng.choice(TOPICS)}, number {self._rng.random()}."
        return {
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self._rng.randrange(4, 64),
            "stream": True,
        }

    def _generate(
        self, text: str, *, return_logprob: bool = False, logprob_start: int = -1, **sampling: Any
    ) -> Any:
        return self._server.post(
            "/generate",
            text=text,
            sampling_params={"temperature": 0} | sampling,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start,
        )

    def _stream(self, path: str, body: dict[str, Any]) -> "Stream":
        return Stream(self._server.port, path, body)


class Stream:
    """Lines of a streamed answer. Leaving early closes the connection."""

    def __init__(self, port: int, path: str, body: dict[str, Any]):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", path, json.dumps(body), headers)
        self._response = self._connection.getresponse()

    def __enter__(self) -> http.client.HTTPResponse:
        expect(self._response.status == 200, "status 200", self._response.status)
        return self._response

    def __exit__(self, *exception: object) -> None:
        self._response.close()
        self._connection.close()


def expect(holds: bool, what: str, found: object) -> None:
    if not holds:
        raise Wrong(f"{what}: {str(found)[:300]}")


class Watch:
    """Takes samples of a server."""

    def __init__(self, server: Server, clients: Sequence[Client]):
        self._server = server
        self._clients = clients
        self._started = time.monotonic()
        self.samples: list[Sample] = []

    def take(self) -> Sample:
        state = self._server.state()
        memory = state["memory"]
        sample = Sample(
            seconds=round(time.monotonic() - self._started, 1),
            processes=processes_of(self._server.pid),
            frames=(memory["expert_frames"], memory["kv_frames"], memory["free_frames"]),
            num_running=state["running_requests"],
            num_queued=state["queued_requests"] + state["preparing_requests"],
            num_done=sum(sum(client.counts.values()) for client in self._clients),
        )
        self.samples.append(sample)
        return sample


def processes_of(group: int) -> dict[str, Usage]:
    """Of a process group, by role."""
    found: dict[str, Usage] = {}
    for pid in sorted(psutil.pids()):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(pid) != group:
                continue
            process = psutil.Process(pid)
            usage = Usage(
                own_mib=round(process.memory_full_info().uss / 2**20, 1),
                files=process.num_fds(),
                threads=process.num_threads(),
                anonymous_mib=round(anonymous_bytes(pid) / 2**20, 1),
            )
            found[role_of(process.cmdline(), is_launcher=pid == group)] = usage
    return found


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) << 10


def role_of(command: Sequence[str], *, is_launcher: bool) -> str:
    """What a process of a server is there for, by its command line or title."""
    if is_launcher:
        return "launcher"
    title = " ".join(command).strip()  # a title leaves the rest of its place empty
    for helper in ("forkserver", "resource_tracker"):
        if f"multiprocessing.{helper}" in title:
            return helper
    return title.partition("::")[2] or title


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Of each process, after the warm-up, in an hour, fitted by a line."""
    settled = samples[int(len(samples) * WARM_UP_SHARE) :]
    hours = np.array([its.seconds for its in settled]) / 3600
    names = set.intersection(*(set(its.processes) for its in settled))
    slopes = {}
    for name in sorted(names):
        figures = np.array([its.processes[name] for its in settled], float)
        fitted = np.polyfit(hours, figures, 1)[0].round(1).tolist()
        slopes[name] = dict(zip(Usage._fields, fitted, strict=True))
    return slopes


def wait_until_quiet(watch: Watch, seconds: float = 60.0) -> Sample:
    """Streams that were left end soon after."""
    deadline = time.monotonic() + seconds
    while True:
        sample = watch.take()
        if not (sample.num_running or sample.num_queued) or time.monotonic() > deadline:
            return sample
        time.sleep(1)


def soak(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * options.minutes
    firsts: dict[str, str] = {}
    clients = [Client(server, number, firsts, deadline) for number in range(options.clients)]
    watch = Watch(server, clients)
    for client in clients:
        client.thread.start()
    with tqdm(total=round(options.minutes * 60), unit="s") as bar:
        while time.monotonic() < deadline:
            time.sleep(options.interval)
            sample = watch.take()
            bar.update(round(sample.seconds) - bar.n)
            bar.set_postfix(done=sample.num_done)
    for client in clients:
        client.thread.join(120)
    last = wait_until_quiet(watch)
    return {
        "requests": dict(sum((client.counts for client in clients), Counter())),
        "unanswered": sum(client.thread.is_alive() for client in clients),
        "problems": [problem for client in clients for problem in client.problems],
        "changed_greedy_answers": sum(client.num_changed for client in clients),
        "left_at_the_end": last.num_running + last.num_queued,
        "growth_per_hour": growth(watch.samples),
        "state": server.state(),
        "samples": [its._asdict() for its in watch.samples],
    }


def verdicts(found: dict[str, Any]) -> list[str]:
    """What is wrong; empty if nothing is."""
    wrong = [f"{found[name]} {name}" for name in ("unanswered", "left_at_the_end") if found[name]]
    wrong += found["problems"][:20]
    for name, grown in found["growth_per_hour"].items():
        if grown["anonymous_mib"] > MAX_GROWTH_MIB_PER_HOUR:
            wrong.append(f"{name} grows by {grown['anonymous_mib']} MiB an hour")
        if grown["files"] > MAX_GROWTH_FILES_PER_HOUR:
            wrong.append(f"{name} opens {grown['files']} files an hour more than it closes")
    return wrong


def plot(samples: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    minutes = [its["seconds"] / 60 for its in samples]
    figure, axes = pyplot.subplots(4, 1, figsize=(8, 9), sharex=True, layout="constrained")
    for name in samples[-1]["processes"]:
        known = [its["processes"].get(name, (np.nan,) * 4) for its in samples]
        axes[0].plot(minutes, [its[0] for its in known], label=name, linewidth=1)
        axes[1].plot(minutes, [its[1] for its in known], label=name, linewidth=1)
    kinds = zip(*(its["frames"] for its in samples), strict=True)
    axes[2].stackplot(minutes, *kinds, labels=("experts", "KV", "free"))
    axes[3].plot(minutes, [its["num_running"] for its in samples], label="running", linewidth=1)
    axes[3].plot(minutes, [its["num_queued"] for its in samples], label="waiting", linewidth=1)
    titles = ("MiB of its own", "open files", "frames", "requests")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_ylabel(title)
        axis.legend(fontsize=7, loc="center right")
    axes[-1].set_xlabel("minutes")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=60)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=str(DEMO_MODEL))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with running(OURS, f"--model-path={options.model_path}", *options.server_flag) as server:
        found = describe_run() | soak(options, server)
    samples = found.pop("samples")
    (options.output / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    packed = lzma.compress(json.dumps(samples).encode())
    (options.output / "samples.json.xz").write_bytes(packed)
    plot(samples, options.output / "soak.png")
    wrong = verdicts(found)
    print(json.dumps({k: v for k, v in found.items() if k != "state"}, indent=1))
    print("\n".join(wrong) or "Nothing was lost, and nothing grows.")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
