"""Does sglmoe know as much as the unmodified server? Scores on tasks, from both, at several budgets.

    python -m eval.accuracy --model-path MODEL [--gsm8k FILE.jsonl] [--mmlu FILE.jsonl]

`--gsm8k`: lines of {"question", "answer"} that end in a number, few-shot, exact match, by SGLang's
own `few_shot_gsm8k`. `--mmlu`: lines of {"question", "choices", "answer": index}, the most likely
letter by the frontend's `select`. Without either, the demo model's tasks: held-out additions and
recalls with four choices. Greedy; exits with 1 if any transcript differs from the unmodified server's.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from eval.demo_model import tasks
from eval.parity import memory_budget
from eval.servers import OURS, UNMODIFIED, Server, describe_run, running

NUM_SHOTS = 5
LONGEST_TOKENS = 2048  # of a few-shot prompt and its answer, by and large


class Score(NamedTuple):
    """A task's outcome: how many were right, and every word that was said."""

    num_right: int
    num_questions: int
    transcript: list[str]

    @property
    def ratio(self) -> float:
        return self.num_right / self.num_questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the ratio."""
        z, n, p = 1.96, self.num_questions, self.ratio
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return centre - half, centre + half


def write_demo_tasks(folder: Path, num_questions: int) -> tuple[Path, Path]:
    """The demo model's tasks as files of the two formats."""
    rng = random.Random(7)
    additions = [tasks.word_problem(a, b) for a, b in tasks.held_out_additions(rng, num_questions)]
    choices = [tasks.draw_choice(rng) for _ in range(num_questions)]
    paths = folder / "additions.jsonl", folder / "choices.jsonl"
    for path, lines in zip(paths, (additions, choices), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def score_gsm8k(server: Server, path: Path, options: argparse.Namespace) -> Score:
    from sglang.test.few_shot_gsm8k import run_eval

    with inside_new_folder() as folder:
        arguments = argparse.Namespace(
            host="127.0.0.1",
            port=server.port,
            data_path=str(path),
            num_questions=options.num_questions,
            num_shots=NUM_SHOTS,
            max_new_tokens=options.max_new_tokens,
            parallel=options.parallel,
            temperature=0.0,
        )
        accuracy = run_eval(arguments)["accuracy"]
        transcript = (folder / "tmp_output_gsm8k.txt").read_text().split("\n\n")
    num_questions = min(options.num_questions, len(path.read_text().splitlines()))
    return Score(round(accuracy * num_questions), num_questions, transcript)


def score_choices(server: Server, path: Path, options: argparse.Namespace) -> Score:
    import sglang

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shots = "".join(tasks.choice_text(line) for line in lines[:NUM_SHOTS])
    asked = lines[NUM_SHOTS : NUM_SHOTS + options.num_questions]

    @sglang.function
    def choose(s: Any, prompt: str) -> None:
        s += shots + prompt
        s += sglang.select("letter", choices=[f" {letter}" for letter in tasks.LETTERS])

    states = choose.run_batch(
        [{"prompt": tasks.choice_text(line, with_answer=False)} for line in asked],
        backend=sglang.RuntimeEndpoint(server.url),
        num_threads=options.parallel,
        progress_bar=True,
    )
    letters = [state["letter"].strip() for state in states]
    right = [
        tasks.LETTERS.index(a) == line["answer"] for a, line in zip(letters, asked, strict=True)
    ]
    return Score(sum(right), len(right), letters)


@contextmanager
def inside_new_folder() -> Iterator[Path]:
    """SGLang's evaluation leaves a file where it runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def score(server: Server, files: dict[str, Path], options: argparse.Namespace) -> dict[str, Score]:
    scorers = {"gsm8k": score_gsm8k, "mmlu": score_choices}
    return {name: scorers[name](server, path, options) for name, path in files.items()}


def table(scores: dict[str, dict[str, Score]]) -> str:
    reference = scores["unmodified"]
    lines = ["| server | task | right | 95 % interval | same words |", "|---|---|---|---|---|"]
    for system, by_task in scores.items():
        for task, its in by_task.items():
            low, high = its.interval
            same = sum(
                a == b for a, b in zip(its.transcript, reference[task].transcript, strict=False)
            )
            lines.append(
                f"| {system} | {task} | {its.num_right} of {its.num_questions} ({its.ratio:.1%}) "
                f"| {low:.1%} to {high:.1%} | {same} of {len(reference[task].transcript)} |"
            )
    return "\n".join(lines)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--budgets", default="100%,50%,25%", help="of the experts, or bytes")
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--mmlu", type=Path)
    parser.add_argument("--num-questions", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=8, help="questions asked at once")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    flags = [f"--model-path={options.model_path}", f"--dtype={options.dtype}", "--random-seed=0"]
    with tempfile.TemporaryDirectory() as folder:
        files = {"gsm8k": options.gsm8k, "mmlu": options.mmlu}
        if not any(files.values()):
            demo = write_demo_tasks(Path(folder), options.num_questions + NUM_SHOTS)
            files = dict(zip(files, demo, strict=True))
        files = {name: path.resolve() for name, path in files.items() if path is not None}
        with running(UNMODIFIED, *flags) as server:
            scores = {"unmodified": score(server, files, options)}
        with running(OURS, *flags) as server:
            state = server.state()
        for budget in options.budgets.split(","):
            allowed = memory_budget(budget, state, LONGEST_TOKENS)
            with running(OURS, *flags, f"--memory-budget={allowed}") as server:
                scores[f"sglmoe, {budget} of the experts"] = score(server, files, options)
    print(table(scores))
    reference = scores["unmodified"]
    same = all(
        its.transcript == reference[task].transcript
        for by_task in scores.values()
        for task, its in by_task.items()
    )
    if options.output is not None:
        rows = {
            system: {
                task: its._asdict() | {"transcript": len(its.transcript)}
                for task, its in by_task.items()
            }
            for system, by_task in scores.items()
        }
        options.output.write_text(json.dumps(describe_run() | {"scores": rows}, indent=1) + "\n")
    print("\nEvery transcript is the same." if same else "\nTRANSCRIPTS DIFFER.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
