"""The worker as it serves on CUDA: arena, copiers, kernels and graphs are the product's, the device is pretended.

Triton kernels, SGLang's of attention and of experts and all of ours, run in Triton's interpreter. What this does not show is
whether a GPU's compiler and its streams do the same.
"""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from decoding import PROMPTS, STEPS, Budget, Decoded, decode, decode_ahead, logprobs_of, measure
from forking import run_in_fork

pytestmark = pytest.mark.usefixtures("preloaded")

SIZES = {  # as small as can be: a program of a kernel takes 10 ms
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
}
NUM_FRAMES = 12  # for 32 experts, and KV
OF_SAMPLING = ["copy to the host"] * 7  # tokens and their log probabilities
OF_A_LAYER = ["copy to the host"]  # its routing
OF_A_GRAPH = ["event"]  # what has become of the frames that it had


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return run_in_fork(
        make_checkpoint, "qwen3_moe", folder, dtype="float32", attention_gain=1.0, **SIZES
    )


@pytest.fixture(scope="module")
def budget(model_dir: Path) -> Budget:
    return run_in_fork(measure, model_dir, "float32")


@pytest.fixture(scope="module")
def roomy(model_dir: Path) -> Decoded:
    """All experts fit into the arena."""
    its = run_in_fork(decode, model_dir)
    assert its.memory.experts_evicted == 0
    return its


def test_the_host_waits_for_routers_and_for_tokens_alone(roomy: Decoded) -> None:
    assert roomy.waits == OF_A_LAYER * len(roomy.layer_ids) + OF_SAMPLING


def test_tokens_are_those_of_a_cpu(model_dir: Path, roomy: Decoded) -> None:
    """Whose attention and experts are other kernels, with other roundings."""
    assert roomy.tokens == run_in_fork(decode, model_dir, on_device=False).tokens


def test_experts_that_are_paged_change_no_bit(
    model_dir: Path, budget: Budget, roomy: Decoded
) -> None:
    """From host memory, which has a quarter of them, and from the checkpoint."""
    tight = run_in_fork(
        decode,
        model_dir,
        budget=budget.bytes(NUM_FRAMES, captures=False),
        host_memory=str(12 * budget.frame_bytes),
    )
    assert tight.rows == roomy.rows  # tokens, log probabilities, routing
    assert tight.violations == []
    memory = tight.memory
    assert memory.experts_evicted > 0
    assert memory.host_hits > 0
    assert memory.disk_reads > 0


@pytest.mark.parametrize("backend", ["breakable", "full"])
def test_replayed_steps_have_the_bits_of_eager_ones(
    backend: str, model_dir: Path, budget: Budget, roomy: Decoded
) -> None:
    replayed = run_in_fork(
        decode,
        model_dir,
        backend=backend,
        budget=budget.bytes(NUM_FRAMES, captures=True),
        host_memory="8MB",
    )
    assert replayed.rows == roomy.rows
    assert replayed.violations == []
    segments = 1 if backend == "full" else len(roomy.layer_ids) + 1
    assert replayed.num_segments == STEPS * segments
    assert replayed.memory.experts_evicted > 0
    is_full = backend == "full"
    assert replayed.memory.lent_steps == (STEPS if is_full else 0)
    assert replayed.waits == (OF_SAMPLING + OF_A_GRAPH if is_full else roomy.waits)


def test_the_host_waits_for_nothing_while_it_begins_a_step_behind_another(
    model_dir: Path, budget: Budget, roomy: Decoded
) -> None:
    its = run_in_fork(
        decode_ahead,
        model_dir,
        num_steps=STEPS + 1,
        backend="full",
        budget=budget.bytes(NUM_FRAMES, captures=True),
        host_memory="8MB",
    )
    assert its.num_followed == STEPS
    assert its.memory.lent_steps == STEPS + 1
    assert its.tokens[:STEPS] == roomy.tokens
    assert its.logprobs[:STEPS] == [logprobs_of(rows) for rows in roomy.rows]
    first, behind_it, finished, behind_that = its.begin_waits
    assert first == ["copy to the device"]  # what requests are to be sampled by, which stays there
    assert behind_it == behind_that == []
    assert len(finished) == 3  # tokens, log probabilities, and what has become of the frames
    assert its.violations == []


def test_a_row_that_pads_a_step_may_hold_no_numbers(model_dir: Path, budget: Budget) -> None:
    """One request in a graph for two: attention of the other row reads KV that nobody has written, so its router may say
    anything."""
    padded = run_in_fork(
        decode,
        model_dir,
        backend="full",
        prompts=PROMPTS[:1],
        spoils_padding=True,
        budget=budget.bytes(NUM_FRAMES, captures=True),
        host_memory="8MB",
    )
    eager = run_in_fork(decode, model_dir, prompts=PROMPTS[:1])
    assert padded.tokens == eager.tokens
    routed, as_before = (
        [[row.routed_experts for row in rows] for rows in its.rows] for its in (padded, eager)
    )
    assert routed == as_before
    used, as_before = (its.memory.expert_hits + its.memory.expert_misses for its in (padded, eager))
    assert used == as_before
    assert padded.memory.lent_steps == STEPS
    assert padded.violations == []


@pytest.mark.parametrize("backend", ["disabled", "full"])
def test_experts_that_come_ahead_change_no_bit(
    backend: str, model_dir: Path, budget: Budget, roomy: Decoded
) -> None:
    """By a thread and a stream of their own; a step that is one graph hears of them by letters."""
    its = run_in_fork(
        decode,
        model_dir,
        backend=backend,
        foreseen=roomy,
        budget=budget.bytes(NUM_FRAMES, captures=backend == "full"),
        host_memory="8MB",
        expert_prefetch="on",
    )
    assert its.rows == roomy.rows
    assert its.violations == []
    assert its.memory.prefetches_used + its.memory.prefetches_late > 0


def test_deepseek_out_of_graphs_has_the_tokens_of_a_cpu(tmp_path: Path) -> None:
    """MLA, whose KV is one vector a token; experts in groups, and some that all tokens share."""
    sizes = {"kv_lora_rank": 256, "qk_rope_head_dim": 32, "head_dim": 32}  # that kernels know
    model_dir = run_in_fork(
        make_checkpoint, "deepseek_v2", tmp_path, dtype="float32", attention_gain=1.0, **sizes
    )
    cpu = run_in_fork(decode, model_dir, on_device=False)
    replayed = run_in_fork(decode, model_dir, backend="full", host_memory="64MB")
    assert replayed.memory.lent_steps == STEPS
    assert replayed.tokens == cpu.tokens
