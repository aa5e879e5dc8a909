"""What `eval.serving` asks of the servers: phases, each a call of sglang's benchmark with its settings.

Text is this machine's (`demo_model/prompts.py`), because a trained model routes random ids unlike
text. It is written in the form of the benchmark's custom dataset, which shuffles by its seed: the
same requests for every system, in an order of its own in each round.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from eval.demo_model.corpus import read_corpus
from eval.demo_model.prompts import prompts_by_domain

LONG, SHORT, LONG_AGAIN = "long prompts", "short prompts", "long prompts again"


class Phase(NamedTuple):
    """One call of the benchmark; what is not in `settings` is the same for all."""

    name: str
    settings: dict[str, Any]


def read_workload(options: argparse.Namespace, folder: Path) -> Callable[[int], Sequence[Phase]]:
    """From a concurrency to the phases of a run, each of which goes on with the cache that the one
    before has left. Text goes into files in `folder`."""
    match options.workload:
        case "random":
            return lambda concurrency: [Phase("random", random_ids(options, concurrency))]
        case "text":
            path = folder / "text.jsonl"
            write_dataset(path, all_domains(4 * 96))
            return lambda concurrency: [
                custom("text", path, options.prompts_per_client * concurrency, options.output_len)
            ]
        case "shared-prefix":
            return lambda concurrency: [
                Phase("shared prefix", generated_shared_prefix(options, concurrency))
            ]
        case "shifting":
            phases = shifting(options, folder)
            return lambda concurrency: phases
    return lambda concurrency: [Phase(options.workload, benchmark_dataset(options, concurrency))]


def random_ids(options: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    return {
        "dataset-name": "random-ids",
        "random-input-len": options.input_len,
        "random-output-len": options.output_len,
        "random-range-ratio": 0.5,
        "num-prompts": options.prompts_per_client * concurrency,
    }


def generated_shared_prefix(options: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    num_prompts = options.prompts_per_client * concurrency
    groups = max(1, concurrency // 4)
    return {
        "dataset-name": "generated-shared-prefix",
        "gsp-num-groups": groups,
        "gsp-prompts-per-group": num_prompts // groups,
        "gsp-system-prompt-len": 4 * options.input_len,
        "gsp-question-len": options.input_len // 4,
        "gsp-output-len": options.output_len,
        "num-prompts": num_prompts,
    }


def benchmark_dataset(options: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    settings = {
        "dataset-name": options.workload,
        "num-prompts": options.prompts_per_client * concurrency,
    }
    return settings | ({"dataset-path": options.dataset_path} if options.dataset_path else {})


# ------------------------------------------------------------------------------------------- shifting


def shifting(options: argparse.Namespace, folder: Path) -> list[Phase]:
    """Few long prompts on common prefixes; many short ones, all different; other questions on the
    same prefixes. Keeping the prefixes through the middle pays in the end, unless the experts that
    the middle asks for have to go for them."""
    num_long = options.prefixes * options.questions_per_prefix
    prefixes = text_windows(options.model_path, options.prefixes, options.prefix_tokens)
    texts = all_domains(2 * num_long + options.short_prompts)
    first, again, short = texts[:num_long], texts[num_long : 2 * num_long], texts[2 * num_long :]
    datasets = {
        LONG: (ask_each(prefixes, first), options.long_output_len),
        SHORT: (short, options.output_len),
        LONG_AGAIN: (ask_each(prefixes, again), options.long_output_len),
    }
    phases = []
    for number, (name, (prompts, output_len)) in enumerate(datasets.items(), 1):
        path = folder / f"phase-{number}.jsonl"
        write_dataset(path, prompts)
        phases.append(custom(name, path, len(prompts), output_len))
    return phases


def ask_each(prefixes: Sequence[str], questions: Sequence[str]) -> list[str]:
    """Every question on one of the prefixes, on each as many."""
    return [
        f"{prefix}\n\n{question}"
        for prefix, question in zip(cycle(prefixes), questions, strict=False)
    ]


def text_windows(model_path: str, count: int, num_tokens: int) -> list[str]:
    """`count` pieces of the held-out text, of so many of the model's tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    held_out = read_corpus().held_out
    text = "\n\n".join(document for domain in ("python", "prose") for document in held_out[domain])
    return cut_windows(text, tokenizer, count=count, num_tokens=num_tokens)


def cut_windows(text: str, tokenizer: Any, *, count: int, num_tokens: int) -> list[str]:
    """Pieces that don't overlap, the same each time. Raises ValueError if there is not so much text."""
    ids = tokenizer.encode(text)
    starts = range(0, len(ids) - num_tokens + 1, num_tokens)
    if len(starts) < count:
        raise ValueError(
            f"the held-out text has {len(ids)} tokens, {count * num_tokens} are wanted"
        )
    picked = random.Random("shifting workload").sample(starts, count)
    return [tokenizer.decode(ids[start : start + num_tokens]) for start in picked]


def all_domains(count: int) -> list[str]:
    """`count` beginnings of text, of each domain in turn."""
    by_domain = prompts_by_domain(-(-count // 4))
    in_turn = (prompt for group in zip(*by_domain.values(), strict=True) for prompt in group)
    return list(islice(in_turn, count))


def custom(name: str, path: Path, num_prompts: int, output_len: int) -> Phase:
    settings = {
        "dataset-name": "custom",
        "dataset-path": path,
        "sharegpt-output-len": output_len,
        "num-prompts": num_prompts,
    }
    return Phase(name, settings)


def write_dataset(path: Path, prompts: Sequence[str]) -> None:
    """The custom dataset of sglang's benchmark; an answer there only gives a length."""
    turns = [[{"content": prompt}, {"content": "an answer"}] for prompt in prompts]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
