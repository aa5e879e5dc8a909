"""What the trained demo model can do, and how its routing differs between domains.

    python -m eval.demo_model.report --model-path sglmoe/demo_model_files

Computes with transformers, in float32 from the bf16 weights. Writes figures and plots to
`eval/demo_model/results/`.
"""

import argparse
import ast
import itertools
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.demo_model import tasks
from eval.demo_model.corpus import Batches, read_corpus
from eval.demo_model.train import ARCHITECTURE, RESULTS, recorded_routing

Examples = list[tuple[str, str]]  # prompt, answer
Usage = npt.NDArray[np.float64]  # [layers, experts], each row sums to 1

NUM_WINDOWS = 60
WINDOW = 256


def examinations() -> dict[str, Examples]:
    """Questions with one right answer, none of them in the training text."""
    rng = random.Random(1)
    pairs = tasks.held_out_additions(rng, 300)
    choices = [tasks.draw_choice(rng) for _ in range(300)]
    tables = [tasks.draw_table(rng) for _ in range(300)]
    return {
        "two-digit additions": [
            (tasks.chat(f"What is {a} + {b}?", "").removesuffix("</s>"), f"{a + b}</s>")
            for a, b in pairs
        ],
        "key-value recall": [
            (
                tasks.chat(f"{tasks.table_text(table)}\nWhat is {key}?", "").removesuffix("</s>"),
                f"{table[key]}</s>",
            )
            for table in tables
            for key in [rng.choice(sorted(table))]
        ],
        "multiple choice": [
            (tasks.choice_text(choice, with_answer=False), f" {tasks.LETTERS[choice['answer']]}")
            for choice in choices
        ],
    }


@torch.inference_mode()
def exact_ratio(model: Any, tokenizer: Any, examples: Examples) -> float:
    """How many answers greedy decoding gets right from the first token to the last."""
    right = 0
    for prompt, answer in examples:
        prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer)
        logits = model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0]
        greedy = logits[len(prompt_ids) - 1 : -1].argmax(dim=-1)
        right += greedy.tolist() == answer_ids
    return right / len(examples)


@torch.inference_mode()
def python_answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Answers to requests for functions, sampled at temperature 0.5."""
    torch.manual_seed(0)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = model.generate(
            ids, max_new_tokens=200, do_sample=True, temperature=0.5, pad_token_id=1
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def parses(code: str) -> bool:
    """Whether it is Python; a last statement that was cut off by the length limit is forgiven."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in (code, code.rpartition("\n")[0]):
            try:
                ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            return bool(re.search(r"\bdef\b", text))
    return False


@torch.inference_mode()
def expert_usage(model: Any, batches: Batches) -> dict[str, Usage]:
    """Each domain's share of assignments by layer and expert, on held-out text."""
    windows, domains = batches.draw(1, NUM_WINDOWS, WINDOW)
    top_k, num_experts = ARCHITECTURE["num_experts_per_tok"], ARCHITECTURE["num_experts"]
    usage: dict[str, Any] = {}  # counts
    for window, domain in zip(windows, domains, strict=True):
        with recorded_routing(model) as logits:
            model(input_ids=torch.from_numpy(window[None].astype(np.int64)))
        counts = [
            np.bincount(layer.topk(top_k).indices.flatten().numpy(), minlength=num_experts)
            for layer in logits
        ]
        usage[domain] = usage.get(domain, 0) + np.stack(counts)
    return {domain: counts / counts.sum(axis=1, keepdims=True) for domain, counts in usage.items()}


def entropy_bits(usage: Usage) -> list[float]:
    """Of the experts' use, by layer: 5 bits when 32 experts are used alike."""
    logs = np.log2(usage, where=usage > 0, out=np.zeros_like(usage))
    return [round(float(value), 3) for value in -(usage * logs).sum(axis=1)]


def overlap(one: Usage, other: Usage) -> float:
    """Share of assignments that two domains have in common, mean over layers: sum_e min(p_e, q_e)."""
    return round(float(np.minimum(one, other).sum(axis=1).mean()), 3)


def routing_report(usage: dict[str, Usage]) -> dict[str, Any]:
    mean = np.mean(list(usage.values()), axis=0)
    return {
        "entropy_bits": {domain: entropy_bits(its) for domain, its in usage.items()},
        "entropy_bits_all": entropy_bits(mean),
        "least_used_expert_share": round(float(mean.min()), 5),
        "overlap": {
            f"{one} / {other}": overlap(usage[one], usage[other])
            for one, other in itertools.combinations(usage, 2)
        },
    }


def plot_losses(losses: list[dict[str, float]], path: Path) -> None:
    figure, axes = new_figure(8, 4)
    for domain in (name for name in losses[0] if name not in ("step", "balance")):
        values = np.array([row[domain] for row in losses])
        smooth = np.convolve(np.pad(values, 4, mode="edge"), np.ones(9) / 9, mode="valid")
        axes.plot([row["step"] for row in losses], smooth, label=domain)
    axes.set(
        xlabel="step", ylabel="training loss (nats a token)", title="Demo model: loss by domain"
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


def plot_usage(usage: dict[str, Usage], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(usage), figsize=(2.6 * len(usage), 2.2), sharey=True, layout="constrained"
    )
    highest = max(its.max() for its in usage.values())
    for panel, (domain, its) in zip(panels, usage.items(), strict=True):
        image = panel.imshow(100 * its, aspect="auto", vmin=0, vmax=100 * highest, cmap="viridis")
        panel.set(title=domain, xlabel="expert")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="% of assignments")
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained", dpi=110)
    return figure, axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_path)
    model = AutoModelForCausalLM.from_pretrained(options.model_path, dtype=torch.float32)
    corpus = read_corpus()
    questions = [
        text.split("<|assistant|>")[0] + "<|assistant|>" for text in corpus.held_out["chat"]
    ]
    prompts = [question for question in questions if "Write the function" in question][:40]
    answers = python_answers(model, tokenizer, prompts)
    usage = expert_usage(model, Batches(corpus.held_out, tokenizer.backend_tokenizer, seed=9))
    report = {
        "exact_ratio": {
            name: round(exact_ratio(model, tokenizer, examples), 3)
            for name, examples in examinations().items()
        },
        "python_that_parses_ratio": round(sum(map(parses, answers)) / len(answers), 3),
        "python_samples": answers[:3],
        "routing": routing_report(usage),
    }
    (RESULTS / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    plot_losses(json.loads((RESULTS / "training.json").read_text())["losses"], RESULTS / "loss.png")
    plot_usage(usage, RESULTS / "routing.png")


if __name__ == "__main__":
    main()
