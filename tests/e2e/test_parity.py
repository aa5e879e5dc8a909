"""Our engine answers as unmodified SGLang does, whatever part of the experts is resident.

Both engines are asked the same questions (`interview`): prompts one at a time, a prompt whose
beginning they have seen, and 16 requests at once. Float32 checkpoints choose each token by the
whole context, so that a wrong KV id shows; bfloat16 ones leave no near-ties.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from sglang_engine import running_engine
from sglmoe_engine import frames_budget, running_sglmoe, state_of

NUM_TOKENS = 20
PAGED_FAMILIES = [family for family in FAMILIES if family != "qwen3"]

pytestmark = pytest.mark.usefixtures("preloaded")


class Output(NamedTuple):
    """A greedy answer with the log probabilities of its tokens."""

    tokens: list[int]
    logprobs: list[float]
    num_cached: int


class Interview(NamedTuple):
    """What an engine answered, and for ours what its memory looked like at the end."""

    solo: list[Output]
    after_prefix_hit: Output
    together: list[Output]
    state: dict[str, Any]


def random_prompts(*lengths: int) -> list[list[int]]:
    chooser = random.Random(7)
    return [[chooser.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in lengths]


SOLO = random_prompts(3, 17, 60, 300)
# Shares 192 tokens with the last one, whole pages of any size we choose by ourselves.
PREFIXED = SOLO[-1][:192] + random_prompts(30)[0]
TOGETHER = random_prompts(*range(2, 98, 6))


def interview(engine: Any) -> tuple[list[Output], Output, list[Output]]:
    return (
        [ask(engine, [prompt])[0] for prompt in SOLO],
        ask(engine, [PREFIXED])[0],
        ask(engine, TOGETHER),
    )


def ask(engine: Any, prompts: list[list[int]]) -> list[Output]:
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    return [
        Output(
            output["output_ids"],
            [entry[0] for entry in output["meta_info"]["output_token_logprobs"]],
            output["meta_info"]["cached_tokens"],
        )
        for output in outputs
    ]


def interview_sglang(model_dir: Path, dtype: str) -> Interview:
    with running_engine(model_dir, dtype=dtype) as engine:
        return Interview(*interview(engine), state={})


def interview_sglmoe(model_dir: Path, dtype: str, memory_budget: str) -> Interview:
    with running_sglmoe(model_dir, dtype=dtype, memory_budget=memory_budget) as engine:
        return Interview(*interview(engine), state=state_of(engine))


def check_same(ours: Interview, theirs: Interview) -> None:
    """Alone: the same tokens and the same bits of their logprobs. Together: the same tokens."""
    assert [output.tokens for output in ours.solo] == [output.tokens for output in theirs.solo]
    assert [output.logprobs for output in ours.solo] == [output.logprobs for output in theirs.solo]
    assert ours.after_prefix_hit == theirs.after_prefix_hit
    assert ours.after_prefix_hit.num_cached == 192
    assert [o.tokens for o in ours.together] == [o.tokens for o in theirs.together]


class Compared(NamedTuple):
    """A family's checkpoint in float32, and what both engines answer where nothing has to give way."""

    model_dir: Path
    theirs: Interview
    roomy: Interview


@pytest.fixture(scope="module", params=PAGED_FAMILIES)
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, preloaded: None
) -> Compared:
    folder = tmp_path_factory.mktemp("parity")
    model_dir = run_in_fork(
        make_checkpoint, request.param, folder, dtype="float32", attention_gain=1.0
    )
    theirs = run_in_fork(interview_sglang, model_dir, "float32")
    return Compared(model_dir, theirs, run_in_fork(interview_sglmoe, model_dir, "float32", "200MB"))


def test_every_budget_gives_the_answers_of_unmodified_sglang(compared: Compared) -> None:
    model_dir, theirs, roomy = compared
    check_same(roomy, theirs)
    memory = roomy.state["memory"]
    assert memory["experts_evicted"] == memory["num_split_layers"] == 0

    num_experts = roomy.state["limits"]["expert_bytes"] // memory["frame_bytes"] + 1
    kv_frames = -(-340 // (memory["page_tokens"] * pages_per_frame(memory, roomy)))
    for num_frames in (num_experts // 2 + kv_frames, num_experts // 4 + kv_frames):
        budget = frames_budget(roomy.state, num_frames)
        tight = run_in_fork(interview_sglmoe, model_dir, "float32", budget)
        check_same(tight, theirs)
        assert tight.state["memory"]["num_frames"] == num_frames
        assert tight.state["memory"]["experts_evicted"] > 0


def pages_per_frame(memory: dict[str, Any], interview: Interview) -> int:
    kv_frames = memory["num_frames"] - interview.state["limits"]["floor_frames"]
    return int(memory["total_pages"]) // int(kv_frames)


def test_fewer_frames_than_a_layer_has_experts(compared: Compared) -> None:
    model_dir, theirs, roomy = compared
    memory, limits = roomy.state["memory"], roomy.state["limits"]
    kv_frames = -(-340 // (memory["page_tokens"] * pages_per_frame(memory, roomy)))
    budget = frames_budget(roomy.state, kv_frames + limits["floor_frames"])
    waves = run_in_fork(interview_sglmoe, model_dir, "float32", budget)
    check_same(waves, theirs)
    assert waves.state["memory"]["num_split_layers"] > 0


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "bfloat16") for family in FAMILIES), ("qwen3_moe", "float16")]
)
def test_half_precision(family: str, dtype: str, tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype=dtype)
    theirs = run_in_fork(interview_sglang, model_dir, dtype)
    check_same(run_in_fork(interview_sglmoe, model_dir, dtype, "200MB"), theirs)
