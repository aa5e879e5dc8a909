"""Two halves that alternate, one computing while the other's experts move, on a link that is only simulated.

    python -m eval.dual_batches --output eval/results/dual-batches.json

The batches are those of `eval.affinity_replay`: all that run together, or halves by affinity that take turns at every step.
Each is replayed without prefetching, with what the server knows (what each request used last; for halves also who is in the
next plan, which is with the worker before a step ends), and with what it can't know: this step's routing from its beginning,
and the next step's. Memory, plans and horizon are the product's (`eval.prefetch_replay`).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.affinity_replay import SCHEMES, TRACES, WORKLOADS, Workload, queue_of
from eval.batch_schedules import as_trace, library_of, schedule
from eval.prefetch_replay import replay
from eval.replay import frames_of
from eval.replay_predictors import Material
from eval.replay_prefetcher import Setting
from eval.servers import describe_run
from eval.simulated_link import LinkSpeed
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.prediction.trace import load_trace
from sglmoe.units import parse_bytes

CELLS = (  # scheme, policy, predictor
    ("together", "cost-aware", None),
    ("together", "cost-aware+prefetch", "last_step"),
    ("together", "cost-aware+prefetch", "oracle"),
    ("together", "cost-aware+prefetch", "oracle_next_step"),
    ("halves, last 8", "cost-aware", None),
    ("halves, last 8", "cost-aware+prefetch", "last_step"),
    ("halves, last 8", "cost-aware+prefetch", "next_plan"),
    ("halves, last 8", "cost-aware+prefetch", "oracle"),
    ("halves, last 8", "cost-aware+prefetch", "oracle_next_step"),
)


def rows_of(name: str, workload: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = library_of([load_trace(TRACES / f"{its}.npz") for its in workload.traces])
    info = library.traces[0].info
    schemes = {scheme.name: scheme for scheme in SCHEMES}
    materials, num_tokens = {}, {}
    for scheme in {cell[0] for cell in CELLS}:
        queue = queue_of(library, workload.repeats, seed=0)
        made = schedule(library, queue, schemes[scheme], num_running=workload.num_running, seed=0)
        num_tokens[scheme] = sum(len(its.rows) for its in made.passes if its.is_decode)
        materials[scheme] = Material(as_trace(library, made), DEMO_MODEL)
    for link in options.bandwidth.split(","):
        expert_bytes = info.geometry.expert_bytes
        setting = Setting(
            num_frames=frames_of(options.expert_frames, info.num_layers * info.num_experts),
            expert_bytes=expert_bytes,
            speed=LinkSpeed(parse_bytes(link, whole_bytes=0), options.latency, expert_bytes // 3),
            layer_seconds=options.layer_seconds,
            attention_ratio=0.5,
            applies_late=False,
            min_probability=0.05,
            horizon_layers=None,
        )
        first = 0.0
        for scheme, policy, predictor in tqdm(CELLS, f"{name}, {link}", leave=False):
            outcome = replay(materials[scheme], setting, policy, predictor)
            seconds = outcome.seconds / num_tokens[scheme]
            first = first or seconds
            yield {
                "workload": name,
                "link": link,
                "batches": scheme,
                "predictor": predictor or "none",
                "ms_a_token": 1000 * seconds,
                "speed": first / seconds,
                "hit_ratio": outcome.hit_ratio,
                "worker_idle": outcome.stall_ratio,
                "link_idle": outcome.idle_ratio,
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workloads", default="mixed, 8;two unlike domains, 8")
    parser.add_argument("--expert-frames", default="25%")
    parser.add_argument("--bandwidth", default="16GB,1GB,250MB", help="bytes a second")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds, of each transfer")
    parser.add_argument("--layer-seconds", type=float, default=200e-6)
    options = parser.parse_args()
    rows = []
    for name in options.workloads.split(";"):
        for row in rows_of(name, WORKLOADS[name], options):
            rows.append(
                {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
            )
            print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if options.output is not None:
        head = json.dumps(describe_run() | {"columns": list(rows[0])}, indent=1)
        lines = ",\n".join(json.dumps(list(row.values())) for row in rows)
        options.output.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
