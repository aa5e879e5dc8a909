"""The bundled model makes sense, whether its experts fit or not."""

import random
from typing import Any

import pytest
from forking import run_in_fork
from sglang_engine import running_engine
from sglmoe_engine import frames_budget, running_sglmoe, state_of

from eval.demo_model.tasks import chat, held_out_additions
from sglmoe.demo_model import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_FRAMES = 96  # for 192 experts and the KV cache

PAIRS = held_out_additions(random.Random(3), 40)
PROMPTS = [chat(f"What is {a} + {b}?", "").removesuffix("</s>") for a, b in PAIRS]
GREEDY = {"temperature": 0, "max_new_tokens": 8}


def add(**options: Any) -> tuple[list[str], dict[str, Any]]:
    """The model's sums, and the state of the engine that was asked."""
    with running_sglmoe(DEMO_MODEL, **options) as engine:
        answers = engine.generate(PROMPTS, GREEDY)
        return [answer["text"] for answer in answers], state_of(engine)


def add_unmodified() -> list[str]:
    with running_engine(DEMO_MODEL) as engine:
        return [answer["text"] for answer in engine.generate(PROMPTS, GREEDY)]


def test_it_adds_numbers_that_it_has_not_seen_added_with_half_of_its_experts_resident() -> None:
    roomy, state = run_in_fork(add, memory_budget="100MiB")
    right = sum(answer == str(a + b) for answer, (a, b) in zip(roomy, PAIRS, strict=True))
    assert right >= 34, list(zip(PAIRS, roomy, strict=True))
    assert roomy == run_in_fork(add_unmodified)
    tight, state = run_in_fork(add, memory_budget=frames_budget(state, NUM_FRAMES))
    assert tight == roomy
    assert state["memory"]["experts_evicted"] > 0
