"""Does sglmoe answer as the unmodified server does, whatever part of the experts is resident?

    python -m eval.parity --model-path MODEL --budgets 100%,50%,25%

Asks both servers the same: greedy with log probabilities, sampled, constrained, long shared
prefixes, each request alone, and all greedy ones at once. A budget in % is that share of the
experts beside the dense weights and the KV cache of the longest request; others are given to
--memory-budget as they are. Prints a table and exits with 1 if an answer to a request that ran
alone differs in a token or in the bits of a log probability. What shares a batch changes the last
bits of a sum, in either server: of requests that run together only the tokens are judged, and only
in float32 (--dtype); in bf16 they are shown. So does where a cached prefix ends: the unmodified
server gets our page size, and where under a small budget less of a prefix was still cached, the
request counts as one of those.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eval.demo_model import tasks
from eval.servers import OURS, UNMODIFIED, Server, describe_run, running

NUM_TOP = 20
SCHEMA = '{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}'


class Answer(NamedTuple):
    """What one request got: its tokens and, by position, the log probabilities asked for."""

    num_prompt_tokens: int
    num_cached_tokens: int
    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]  # token id -> log probability, the NUM_TOP highest


class Difference(NamedTuple):
    """One kind of requests, theirs against ours."""

    num_requests: int
    num_alike: int  # of these, alone in their batch and with as much of the prompt cached
    equal_tokens_ratio: float
    max_logprob_difference: float
    max_kl_nats: float
    alike_are_equal: bool  # in every token and every bit


def requests_by_kind(num_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """The same requests in every run. All but "together" run one at a time."""
    rng = random.Random(0)
    texts = [tasks.arithmetic_document(rng) + tasks.recall_document(rng) for _ in range(6)]
    texts += ["def main(", "The capital of France is", "1, 2, 3,", "{", "Once upon a time"]
    prefix = "".join(tasks.recall_document(rng) for _ in range(5))
    tails = [tasks.arithmetic_document(rng) for _ in range(4)]
    greedy = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    with_logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": NUM_TOP}

    def ask(text: str, sampling: dict[str, Any]) -> dict[str, Any]:
        return {"text": text, "sampling_params": sampling, **with_logprobs}

    constraints = [{"regex": "[a-f]{3,8}[0-9]{4}"}, {"json_schema": SCHEMA}]
    return {
        # First: it draws from a generator that both servers seed alike when they start.
        "sampled": [ask(text, greedy | {"temperature": 0.8, "top_p": 0.9}) for text in texts],
        "greedy": [ask(text, greedy) for text in texts],
        "constrained": [
            ask(text, greedy | constraint | {"ignore_eos": False})
            for text in texts[:4]
            for constraint in constraints
        ],
        "shared prefix": [
            ask(prefix + tail, greedy) | {"logprob_start_len": -1} for tail in (*tails, *tails)
        ],
        "together": [ask(text, greedy) for text in texts],
    }


def ask_all(server: Server, num_tokens: int) -> dict[str, list[Answer]]:
    """Answers by kind. The cache is flushed in between, so that only "shared prefix" finds anything."""
    answers = {}
    for kind, requests in requests_by_kind(num_tokens).items():
        server.post("/flush_cache?timeout=30")
        if kind == "together":
            columns = {name: [request[name] for request in requests] for name in requests[0]}
            outputs = server.post("/generate", **columns)
        else:
            outputs = [server.post("/generate", **request) for request in requests]
        answers[kind] = [read_answer(output) for output in outputs]
    return answers


def read_answer(output: dict[str, Any]) -> Answer:
    meta = output["meta_info"]
    prompt, generated = meta["input_token_logprobs"], meta["output_token_logprobs"]
    top = [*meta["input_top_logprobs"], *meta["output_top_logprobs"]]
    return Answer(
        num_prompt_tokens=meta["prompt_tokens"],
        num_cached_tokens=meta["cached_tokens"],
        tokens=output["output_ids"],
        logprobs=[entry[0] for entry in (*prompt, *generated) if entry[0] is not None],
        top=[{entry[1]: entry[0] for entry in entries} for entries in top if entries],
    )


def compare(theirs: list[Answer], ours: list[Answer], *, together: bool) -> Difference:
    pairs = list(zip(theirs, ours, strict=True))
    alike = [(a, b) for a, b in pairs if a.num_cached_tokens == b.num_cached_tokens]
    if together:
        alike = []
    return Difference(
        num_requests=len(pairs),
        num_alike=len(alike),
        equal_tokens_ratio=statistics.fmean(equal_ratio(a.tokens, b.tokens) for a, b in pairs),
        max_logprob_difference=max(logprob_difference(a, b) for a, b in pairs),
        max_kl_nats=max(
            (kl_nats(p, q) for a, b in pairs for p, q in zip(a.top, b.top, strict=False)),
            default=0.0,
        ),
        alike_are_equal=all(
            a.tokens == b.tokens and logprob_difference(a, b) == 0 for a, b in alike
        ),
    )


def equal_ratio(theirs: list[int], ours: list[int]) -> float:
    """The share of tokens up to the first difference."""
    length = max(len(theirs), len(ours))
    if theirs == ours:
        return 1.0
    equal = [a == b for a, b in zip(theirs, ours, strict=False)]
    return (equal.index(False) if False in equal else len(equal)) / length


def logprob_difference(theirs: Answer, ours: Answer) -> float:
    """The largest; infinite where there are more of one than of the other."""
    if len(theirs.logprobs) != len(ours.logprobs):
        return math.inf
    return max(abs(a - b) for a, b in zip(theirs.logprobs, ours.logprobs, strict=True))


def kl_nats(theirs: dict[int, float], ours: dict[int, float]) -> float:
    """Kullback-Leibler divergence over their top tokens; one that we lack counts as our least likely."""
    least = min(ours.values())
    return sum(math.exp(p) * (p - ours.get(token, least)) for token, p in theirs.items() if p > -50)


def memory_budget(budget: str, state: dict[str, Any], longest_tokens: int) -> str:
    """--memory-budget for "50%" of the experts; anything else is one already.

    `state` is that of our server with the same model under any budget.
    """
    if not budget.endswith("%"):
        return budget
    memory, limits = state["memory"], state["limits"]
    expert_frames = math.ceil(
        float(budget[:-1]) / 100 * limits["expert_bytes"] / memory["frame_bytes"]
    )
    frame_tokens = memory["total_pages"] * memory["page_tokens"] // max_kv_frames(state)
    kv_frames = math.ceil(longest_tokens / frame_tokens) + 1
    frames = max(expert_frames, limits["floor_frames"]) + kv_frames
    return str(limits["dense_bytes"] + frames * memory["frame_bytes"])


def max_kv_frames(state: dict[str, Any]) -> int:
    return int(state["memory"]["num_frames"]) - int(state["limits"]["floor_frames"])


def holds(difference: Difference, *, exact: bool) -> bool:
    """`exact`: in float32, last bits don't decide which token is the likeliest."""
    return difference.alike_are_equal and (difference.equal_tokens_ratio == 1 or not exact)


def table(results: dict[str, dict[str, Difference]], moved: dict[str, str]) -> str:
    lines = [
        "| experts resident | requests | of these alike | the same bits | equal tokens "
        "| max abs. Δ logprob | max KL (nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget, kinds in results.items():
        for kind, difference in kinds.items():
            lines.append(
                f"| {budget} | {difference.num_requests} {kind} | {difference.num_alike} "
                f"| {'yes' if difference.alike_are_equal else 'NO'} "
                f"| {difference.equal_tokens_ratio:.1%} "
                f"| {difference.max_logprob_difference:.2g} | {difference.max_kl_nats:.2g} |"
            )
        lines.append(f"| {budget} | {moved[budget]} | | | | | |")
    return "\n".join(lines)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--budgets", default="100%,50%,25%")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-tokens", type=int, default=32, help="generated for each request")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    for name in ("server", "our", "their"):
        help_text = "for both servers" if name == "server" else f"for {name}s alone"
        parser.add_argument(f"--{name}-flag", action="append", default=[], help=help_text)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    flags = [f"--model-path={options.model_path}", f"--dtype={options.dtype}", "--random-seed=0"]
    flags += options.server_flag
    with running(OURS, *flags, *options.our_flag) as server:
        state = server.state()
    page_size = f"--page-size={state['limits']['page_tokens']}"
    with running(UNMODIFIED, *flags, page_size, *options.their_flag) as server:
        theirs = ask_all(server, options.num_tokens)
    longest = max(
        answer.num_prompt_tokens + len(answer.tokens)
        for answers in theirs.values()
        for answer in answers
    )
    results, moved = {}, {}
    for budget in options.budgets.split(","):
        ours_flags = [*flags, f"--memory-budget={memory_budget(budget, state, longest)}"]
        with running(OURS, *ours_flags, *options.our_flag) as server:
            ours = ask_all(server, options.num_tokens)
            memory = server.state()["memory"]
        results[budget] = {
            kind: compare(theirs[kind], ours[kind], together=kind == "together") for kind in theirs
        }
        moved[budget] = (
            f"{memory['expert_misses']} experts loaded, {memory['experts_evicted']} evicted, "
            f"{memory['num_split_layers']} layers in waves; "
            f"{memory['cache_hit_tokens']} tokens found cached"
        )
    print(table(results, moved))
    judged = [
        holds(difference, exact=options.dtype == "float32")
        for kinds in results.values()
        for difference in kinds.values()
    ]
    if options.output is not None:
        report = describe_run() | {
            "results": {
                b: {k: d._asdict() for k, d in kinds.items()} for b, kinds in results.items()
            },
            "memory": moved,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\nAll equal." if all(judged) else "\nDIFFERENT.")
    return 0 if all(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
