"""16 requests of every kind at once come out as each does alone on unmodified SGLang."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from following_worker import have_steps_follow
from forking import run_in_fork
from halving_scheduler import decode_in_halves
from holding_scheduler import hold_prompts_back
from sglang_engine import running_engine
from sglmoe_engine import frames_budget, running_sglmoe, state_of

pytestmark = pytest.mark.usefixtures("preloaded")

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
FAVOURED = {"logit_bias": {"77": 16.0}}  # token 77 comes again and again, unless penalised
ENDING = {"logit_bias": {"1": 50.0}, "ignore_eos": False}  # the end of sequence comes at once


class Kind(NamedTuple):
    """Requests that have one right answer, which without `asked` would be another."""

    asked: dict[str, Any]
    setting: dict[str, Any]


KINDS = [
    Kind({}, {}),
    Kind({"frequency_penalty": 1.7, "presence_penalty": 0.4}, FAVOURED),
    Kind({"repetition_penalty": 0.3}, {}),
    Kind({"min_new_tokens": 12}, ENDING),
    Kind(FAVOURED, {}),
    Kind({"regex": "[a-f]{3,8}[0-9]{4}", "ignore_eos": False}, {}),
    Kind({"json_schema": '{"type": "array", "items": {"type": "integer"}, "maxItems": 3}'}, {}),
    Kind({"stop": ["e"], "ignore_eos": False}, {}),
    Kind({}, {"top_k": 1, "temperature": 0.9}),
]


def mixed_requests(*, as_asked: bool = True) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and sampling parameters; without what each asks for, if not `as_asked`."""
    chooser = random.Random(3)
    requests = []
    for i in range(16):
        kind = KINDS[i % len(KINDS)]
        prompt = [chooser.randrange(5, VOCAB_SIZE) for _ in range(chooser.randrange(2, 120))]
        requests.append((prompt, GREEDY | kind.setting | (kind.asked if as_asked else {})))
    return requests


class Answers(NamedTuple):
    """To each alone, to all together, and the engine's state in the end."""

    alone: list[Any]
    together: list[Any]
    state: dict[str, Any]


def answers(model_dir: Path, memory_budget: str, **options: Any) -> Answers:
    requests = mixed_requests()
    with running_sglmoe(
        model_dir,
        dtype="float32",
        memory_budget=memory_budget,
        enable_return_routed_experts=True,
        **options,
    ) as engine:
        alone = ask_alone(engine, requests)
        engine.flush_cache()
        together = engine.generate(
            input_ids=[ids for ids, _ in requests],
            sampling_params=[params for _, params in requests],
            return_logprob=[i % 3 == 0 for i in range(16)],
            return_routed_experts=True,
        )
        return Answers(alone, [output["output_ids"] for output in together], state_of(engine))


def answers_in_halves(model_dir: Path, memory_budget: str, **options: Any) -> Answers:
    """As `answers`, by a scheduler that alternates between two halves."""
    decode_in_halves()
    return answers(model_dir, memory_budget, **options)


def answers_of_held_prompts(model_dir: Path, memory_budget: str) -> Answers:
    """As `answers`, by a scheduler that lets prompts wait while anybody decodes."""
    hold_prompts_back()
    return answers(model_dir, memory_budget, fill_passes="on")


def answers_of_following_steps(model_dir: Path, memory_budget: str) -> Answers:
    """As `answers`, by decode steps that are one graph each."""
    have_steps_follow()
    return answers(model_dir, memory_budget, host_memory="8MB")


def answers_of_sglang(model_dir: Path) -> tuple[list[Any], list[Any]]:
    """Each alone as it is asked, and without what it asks for."""
    with running_engine(model_dir, dtype="float32") as engine:
        unasked = ask_alone(engine, mixed_requests(as_asked=False))
        return ask_alone(engine, mixed_requests()), unasked


def ask_alone(engine: Any, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    return [
        engine.generate(input_ids=ids, sampling_params=params)["output_ids"]
        for ids, params in requests
    ]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    return run_in_fork(make_checkpoint, "qwen3_moe", folder, dtype="float32", attention_gain=1.0)


@pytest.fixture(scope="module")
def roomy(model_dir: Path) -> Answers:
    """Where all experts and everybody's KV fit."""
    return run_in_fork(answers, model_dir, "200MB")


def test_mixed_requests_match_their_solo_runs(model_dir: Path, roomy: Answers) -> None:
    theirs, unasked = run_in_fork(answers_of_sglang, model_dir)
    without_effect = [
        KINDS[i % len(KINDS)].asked
        for i in range(16)
        if KINDS[i % len(KINDS)].asked and theirs[i] == unasked[i]
    ]
    assert without_effect == [], "a server that ignores these would pass"
    roomy_alone, roomy_together, state = roomy
    # Alone against alone: a penalty that is never counted would be the same alone and together.
    assert roomy_alone == theirs
    assert roomy_together == roomy_alone
    assert len({tuple(tokens) for tokens in roomy_alone}) >= 15  # a favoured token fills two
    # 20 frames: 16 requests of up to 144 tokens take turns, and most experts are absent.
    budget = frames_budget(state, 20)
    tight_alone, tight_together, tight = run_in_fork(answers, model_dir, budget)
    assert tight_alone == roomy_alone
    assert tight_together == roomy_alone
    assert tight["memory"]["experts_evicted"] > 0
    assert tight["memory"]["num_split_layers"] > 0


def test_halves_that_take_turns_answer_the_same(model_dir: Path, roomy: Answers) -> None:
    """A request's pages stay where they are, whoever decodes with it: nothing to merge, nothing to index anew."""
    alone, together, whole = roomy
    alone_again, in_halves, halved = run_in_fork(answers_in_halves, model_dir, "200MB")
    assert alone_again == alone
    assert in_halves == together == alone
    # Steps of the crowd, 24 and a few more, are twice as many; those of lone requests are not.
    more_steps = halved["memory"]["step_id"] - whole["memory"]["step_id"]
    assert 20 <= more_steps <= 40
    # Many wait here, and go by whom they are like.
    tight = frames_budget(whole, 20)
    _, in_tight_halves, state = run_in_fork(
        answers_in_halves, model_dir, tight, expert_affinity="on"
    )
    assert in_tight_halves == alone
    assert state["admitted_out_of_turn"] > 0


def test_prompts_that_wait_for_fuller_passes_answer_the_same(
    model_dir: Path, roomy: Answers
) -> None:
    alone, _, state = roomy
    tight = frames_budget(state, 20)  # where they come to run one after the other
    alone_again, held_together, held = run_in_fork(answers_of_held_prompts, model_dir, tight)
    assert alone_again == held_together == alone
    assert held["held_passes"] > 0


def test_steps_that_begin_behind_others_answer_the_same(model_dir: Path, roomy: Answers) -> None:
    """Of those alone who want nothing but tokens; all others' are finished one by one, in between."""
    alone, _, _ = roomy
    all_there = run_in_fork(answers_of_following_steps, model_dir, "200MB")
    limits, memory = all_there.state["limits"], all_there.state["memory"]
    frames = 28 * memory["frame_bytes"] + memory["frame_bytes"] // 2  # and padding
    tight = str(limits["dense_bytes"] + limits["graph_bytes"] + frames)
    half_there = run_in_fork(answers_of_following_steps, model_dir, tight)
    for its in (all_there, half_there):
        assert its.alone == its.together == alone
        memory = its.state["memory"]
        assert memory["lent_steps"] > memory["followed_steps"] > 100
    assert half_there.state["memory"]["experts_evicted"] > 0


def penalised_answers(running: Any, model_dir: Path, **options: Any) -> list[Any]:
    with running(model_dir, dtype="float32", **options) as engine:
        return ask_alone(engine, mixed_requests()[1:3])


def test_penalties_count_at_once_without_overlap(model_dir: Path) -> None:
    """SGLang's overlapped scheduler, the default above, counts a token one step late."""
    theirs = run_in_fork(
        penalised_answers, running_engine, model_dir, disable_overlap_schedule=True
    )
    ours, late = (
        run_in_fork(
            penalised_answers,
            running_sglmoe,
            model_dir,
            memory_budget="200MB",
            disable_overlap_schedule=at_once,
        )
        for at_once in (True, False)
    )
    assert ours == theirs
    assert late != theirs
