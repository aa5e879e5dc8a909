"""Does `sglmoe.plan` foretell what a server does? Hit ratios and tokens per second of decoding, under several budgets.

    python -m eval.plan_accuracy --budgets 20%,30%,50%,75%,100% --output eval/results/plan-accuracy-cpu

The machine's speed is measured by the plan, as for anyone. Then a server runs under each budget, with
prompts of the demo model's domains that no reference trace has, greedy answers of --output-tokens, so many
requests at a time. Hits are the growth of the server's counters, prefill and all; tokens per second are those
of the whole run's answers. Each round asks all budgets, so that what drifts, drifts for all; medians count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from eval.demo_model.prompts import prompts_by_domain
from eval.parity import memory_budget
from eval.servers import OURS, Server, describe_run, running
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.plan.budgets import DecodeForecast, Demand, PlanSnapshot, plan_budget
from sglmoe.plan.cost_model import CostModel
from sglmoe.plan.measure import measure_costs
from sglmoe.plan.model_shape import read_model

PROMPT_CHARACTERS = 60
NUM_TRACED = 48  # the first of each domain, which the reference traces are made from


class Comparison(NamedTuple):
    """Medians of a budget at so many requests at a time."""

    budget: str
    concurrency: int
    hit_ratio: float
    predicted_hit_ratio: float
    tokens_per_second: float
    predicted_tokens_per_second: float


def prompts() -> list[str]:
    by_domain = prompts_by_domain(2 * NUM_TRACED)
    return [
        text[:PROMPT_CHARACTERS]
        for group in zip(*by_domain.values(), strict=True)
        for text in group
    ][NUM_TRACED * len(by_domain) :]


def run_load(server: Server, texts: Sequence[str], clients: int, tokens: int) -> dict[str, float]:
    """All texts by so many clients; what the server counted meanwhile."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    server.post("/flush_cache?timeout=30")
    before = server.state()["memory"]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(
            pool.map(
                lambda text: server.post("/generate", text=text, sampling_params=sampling), texts
            )
        )
    seconds = time.perf_counter() - started
    after = server.state()["memory"]
    grown = {name: after[name] - before[name] for name in ("expert_hits", "expert_misses")}
    return {
        "hit_ratio": grown["expert_hits"] / sum(grown.values()),
        "tokens_per_second": len(texts) * tokens / seconds,
    }


def measure(options: argparse.Namespace, budgets: dict[str, str]) -> Iterator[dict[str, Any]]:
    texts = prompts()
    with ExitStack() as stack:
        servers = {}
        for name, budget in budgets.items():
            flags = (f"--model-path={options.model_path}", f"--memory-budget={budget}")
            servers[name] = stack.enter_context(running(OURS, *flags, "--random-seed=0"))
            stack.enter_context(servers[name].stopped())
        for number in range(-1, options.rounds):  # the first warms up
            for clients in options.concurrency:
                for name, server in servers.items():
                    asked = texts[: max(4, 2 * clients)]
                    with server.awake():
                        figures = run_load(server, asked, clients, options.output_tokens)
                    if number >= 0:
                        row = {"budget": name, "concurrency": clients, "round": number, **figures}
                        print(row, flush=True)
                        yield row


def compare(
    rows: Sequence[dict[str, Any]], forecasts: Mapping[str, Sequence[DecodeForecast]]
) -> list[Comparison]:
    found = []
    for budget, of_budget in forecasts.items():
        for forecast in of_budget:
            mine = [
                row
                for row in rows
                if (row["budget"], row["concurrency"]) == (budget, forecast.concurrency)
            ]
            found.append(
                Comparison(
                    budget=budget,
                    concurrency=forecast.concurrency,
                    hit_ratio=statistics.median(row["hit_ratio"] for row in mine),
                    predicted_hit_ratio=forecast.hit_ratio,
                    tokens_per_second=statistics.median(row["tokens_per_second"] for row in mine),
                    predicted_tokens_per_second=forecast.tokens_per_second,
                )
            )
    return found


def table(found: Sequence[Comparison]) -> str:
    lines = [
        "| budget | requests | hits | predicted | tokens/s | predicted | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for its in found:
        off = its.predicted_tokens_per_second / its.tokens_per_second - 1
        lines.append(
            f"| {its.budget} | {its.concurrency} | {its.hit_ratio:.1%} | {its.predicted_hit_ratio:.1%} "
            f"| {its.tokens_per_second:.0f} | {its.predicted_tokens_per_second:.0f} | {off:+.0%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=str(DEMO_MODEL))
    parser.add_argument("--budgets", default="20%,30%,50%,75%,100%", help="as eval.parity's")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="writes .json and .md")
    options = parser.parse_args(arguments)
    options.concurrency = tuple(map(int, options.concurrency.split(",")))
    request_tokens = options.output_tokens // 2 + PROMPT_CHARACTERS // 2
    model = read_model(options.model_path, device="cpu")
    costs: CostModel = measure_costs(model, device="cpu", request_tokens=request_tokens)
    with running(OURS, f"--model-path={options.model_path}") as server:
        state = server.state()
    kv_tokens = max(options.concurrency) * (options.output_tokens + PROMPT_CHARACTERS)
    budgets = {text: memory_budget(text, state, kv_tokens) for text in options.budgets.split(",")}
    now = PlanSnapshot(
        shape=model.shape,
        costs=costs,
        demand=Demand(concurrency=options.concurrency, request_tokens=request_tokens),
        page_cache_bytes=2**40,  # the checkpoint has been read
    )
    forecasts = {
        name: plan_budget(now, int(budget), 0).forecasts for name, budget in budgets.items()
    }
    rows = list(measure(options, budgets))
    found = compare(rows, forecasts)
    print(table(found))
    report = describe_run() | {
        "costs": {name: getattr(costs, name) for name in costs.__struct_fields__},
        "rows": rows,
        "compared": [its._asdict() for its in found],
    }
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
