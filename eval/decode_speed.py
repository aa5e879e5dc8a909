"""Decode steps of this engine and of unmodified SGLang, side by side at the same bytes, on a GPU:

    python -m eval.decode_speed OUT.json --model DIR [--seconds 560] [--only 50] [--packed]

DIR: a checkpoint such as `eval.shaped_model` writes. Engines run one after the other, each in a process of its own; a line
comes as soon as a figure is known, and what the time does not suffice for is named. With all experts on the GPU: unmodified
with CUDA graphs, and ours. With a share of the experts' bytes, and the same KV: unmodified with `--enable-paged-experts`; ours
out of full graphs, with experts packed in host memory (`--packed`, once `sglmoe.pack` has run), and prefetching; unmodified
with `--cpu-offload-gb`. A step's time is the difference between answers of two lengths to the same prompts.

Without a GPU it is a rehearsal, of eager steps. No GPU has run this yet.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.kernel_speed import described
from sglmoe.decode_graphs import graph_bytes
from sglmoe.plan.model_shape import ModelShape, read_model

KV_TOKENS = 16384  # on both sides
MOST_REQUESTS = 64
PROMPT_TOKENS, SHORT_TOKENS, ROUNDS = 64, 8, 3
ALL_BATCHES, SHARE_BATCHES = (1, 8, 32), (1, 4, 16, 64)
SHARES = (50, 75, 25)  # of the experts' bytes, in per cent
MEASURED_SECONDS = 2.0  # that an answer should take at least
GIB = 2**30
# What the bundle for a machine without network has: see `eval.decode_graphs`.
BACKENDS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "moe_runner_backend": "triton",
}
COMMON = {
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "max_running_requests": MOST_REQUESTS,
    "log_level": "warning",
}


class Contestant(NamedTuple):
    """An engine with its flags, and the requests that it answers at once."""

    name: str
    share: int  # per cent of the experts' bytes on the GPU
    is_ours: bool
    flags: dict[str, Any]
    batches: Sequence[int]


class Figure(NamedTuple):
    """Of decode steps of one size."""

    name: str
    share: int
    batch: int
    step_milliseconds: float
    tokens_per_second: float
    state: dict[str, Any]  # ours: what memory did since the start


def rehearsal(shape: ModelShape) -> Iterator[Contestant]:
    """What can run without a GPU."""
    plain = {"memory_budget", "host_memory", "packed_experts"}
    for share in (100, 50):
        theirs = {"max_total_tokens": KV_TOKENS, "device": "cpu"}
        yield Contestant("unmodified", share, False, theirs, (1, 4))
        flags = {name: its for name, its in ours(shape, share).items() if name in plain}
        yield Contestant("sglmoe", share, True, flags, (1, 4))


def contestants(shape: ModelShape, *, has_packed: bool) -> Iterator[Contestant]:
    """The most telling ones first."""
    yield Contestant("unmodified", 100, False, theirs(), ALL_BATCHES)
    yield Contestant("sglmoe", 100, True, ours(shape, 100), ALL_BATCHES)
    for share in SHARES:
        paged = {
            "enable_paged_experts": True,
            "paged_experts_num_resident": shape.num_experts * share // 100,
        }
        yield Contestant("paged experts", share, False, theirs() | paged, SHARE_BATCHES)
        yield Contestant("sglmoe", share, True, ours(shape, share), SHARE_BATCHES)
        if has_packed:
            flags = ours(shape, share, packed_experts="on")
            yield Contestant("sglmoe, packed", share, True, flags, SHARE_BATCHES)
        if share == SHARES[0]:
            flags = ours(shape, share, expert_prefetch="on")
            yield Contestant("sglmoe, prefetching", share, True, flags, SHARE_BATCHES)
        experts = shape.num_moe_layers * shape.num_experts * shape.expert_bytes
        offload = {"cpu_offload_gb": -(-experts * (100 - share) // 100 // GIB)}
        flags = theirs() | offload | {"disable_cuda_graph": True}
        yield Contestant("cpu offload", share, False, flags, SHARE_BATCHES[:2])


def theirs() -> dict[str, Any]:
    return {
        "max_total_tokens": KV_TOKENS,
        "cuda_graph_max_bs_decode": MOST_REQUESTS,
        "cuda_graph_backend_prefill": "disabled",
    }


def ours(shape: ModelShape, share: int, **options: str) -> dict[str, Any]:
    """The same bytes for experts and KV; what is set aside for graphs comes on top, as theirs do."""
    its = shape
    num_experts = its.num_moe_layers * its.num_experts
    kv_frames = -(-KV_TOKENS * its.token_bytes // its.expert_bytes)
    frames = num_experts * share // 100 + kv_frames
    graphs = graph_bytes(
        MOST_REQUESTS, context_tokens=its.context_tokens, vocab_size=its.vocab_size
    )
    return {
        # A frame is rounded up to whole pages, by less than 2 %; two for what pads steps.
        "memory_budget": str(
            its.dense_bytes + int((frames + 2) * its.expert_bytes * 1.02) + graphs
        ),
        "host_memory": str(num_experts * (its.expert_bytes + 4096)),
        "cuda_graph_backend_decode": "full",
        "cuda_graph_max_bs_decode": MOST_REQUESTS,
        "packed_experts": "off",
        **options,
    }


def start(its: Contestant, model: str) -> Any:
    backends = BACKENDS if torch.cuda.is_available() else {}
    flags = {"model_path": model, **COMMON, **backends, **its.flags}
    if its.is_ours:
        from sglmoe import Engine

        return Engine(**flags)
    from sglang import Engine as Unmodified

    return Unmodified(**flags)


def measure(engine: Any, batch: int, vocab_size: int) -> tuple[float, int]:
    """Seconds of a step, and tokens of the longer answers."""
    chooser = random.Random(batch)
    prompts = [
        [chooser.randrange(5, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(batch)
    ]

    def ask(num_tokens: int) -> float:
        params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        started = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=params)
        return time.perf_counter() - started

    ask(SHORT_TOKENS)
    step = max(ask(2 * SHORT_TOKENS) - ask(SHORT_TOKENS), 1e-4) / SHORT_TOKENS
    most = KV_TOKENS // batch - PROMPT_TOKENS - 1
    longer = min(max(int(MEASURED_SECONDS / step), 4 * SHORT_TOKENS), 256, most)
    rounds = [(ask(SHORT_TOKENS), ask(longer)) for _ in range(ROUNDS)]
    seconds = statistics.median(long - short for short, long in rounds)
    return seconds / (longer - SHORT_TOKENS), longer


def all_contestants(model: str, *, has_packed: bool) -> tuple[ModelShape, list[Contestant]]:
    """And the shape of what they serve."""
    has_gpu = torch.cuda.is_available()
    shape = read_model(model, device="cuda" if has_gpu else "cpu").shape
    return shape, [*(contestants(shape, has_packed=has_packed) if has_gpu else rehearsal(shape))]


def run_one(number: int, model: str, *, has_packed: bool) -> None:
    """In a process of its own: a line for each batch."""
    shape, everyone = all_contestants(model, has_packed=has_packed)
    its = everyone[number]
    engine = start(its, model)
    try:
        for batch in its.batches:
            seconds, _ = measure(engine, batch, shape.vocab_size)
            state: dict[str, Any] = {}
            if its.is_ours:
                (found,) = engine.get_server_info()["internal_states"]
                state = found["sglmoe"]["memory"]
            figure = Figure(its.name, its.share, batch, 1e3 * seconds, batch / seconds, state)
            print("FIGURE " + json.dumps(figure._asdict()), flush=True)
    finally:
        engine.shutdown()


def figures_of(command: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """What a process says, as long as it may run; the end of its other words, where it fails."""
    with subprocess.Popen(
        ["timeout", "-k", "5", str(int(seconds)), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        words: list[str] = []
        for line in process.stdout:
            if line.startswith("FIGURE "):
                yield json.loads(line.removeprefix("FIGURE "))
            else:
                words.append(line)
    if process.returncode:
        print(f"status {process.returncode}: " + "".join(words[-25:]), flush=True)


def ratios(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second of each engine over those of every unmodified one with the same share and batch."""
    theirs = [its for its in figures if not its["name"].startswith("sglmoe")]
    return [
        {
            "share": its["share"],
            "batch": its["batch"],
            "engine": its["name"],
            "over": other["name"],
            "ratio": round(its["tokens_per_second"] / other["tokens_per_second"], 3),
        }
        for its in figures
        for other in theirs
        if its["name"].startswith("sglmoe")
        and (its["share"], its["batch"]) == (other["share"], other["batch"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="file for the figures")
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all that")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="shares: 100, 75, 50, 25")
    parser.add_argument("--packed", action="store_true", help="the checkpoint was packed")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.number is not None:
        run_one(options.number, options.model, has_packed=options.packed)
        return
    deadline = time.monotonic() + options.seconds
    _, everyone = all_contestants(options.model, has_packed=options.packed)
    found: dict[str, Any] = {**described(), "figures": [], "ratios": []}
    for number, its in enumerate(everyone):
        if options.only and its.share not in options.only:
            continue
        left = deadline - time.monotonic()
        if left < 30:
            print(f"no time: {its.name} at {its.share} %", flush=True)
            continue
        command = [sys.executable, "-m", "eval.decode_speed", *sys.argv[1:]]
        for figure in figures_of([*command, f"--number={number}"], left):
            print(json.dumps({key: figure[key] for key in list(figure)[:5]}), flush=True)
            found["figures"].append(figure)
            found["ratios"] = ratios(found["figures"])
            options.output.write_text(json.dumps(found, indent=1) + "\n")
    for line in found["ratios"]:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
