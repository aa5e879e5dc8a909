"""SGLang's Triton attention in the interpreter, on our token table and arena: the tokens are those of a CPU's own attention.

On CUDA attention looks KV ids up through SGLang's translator, on a CPU in the table itself.
"""

import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
PROMPTS = {"long": list(range(20, 60)), "short": list(range(100, 117))}
NUM_TOKENS = 6


def decode(directory: Path, backend: str) -> dict[str, list[int]]:
    """What each request is answered; they are prefilled one by one, then decode together."""
    from checkpoints import make_checkpoint
    from loaded_worker import LoadedWorker

    from sglmoe.protocol import Row

    options = {"dtype": "float32", "attention_gain": 1.0}
    model_dir = make_checkpoint("qwen3_moe", directory / backend, **options)
    worker = LoadedWorker(model_dir, dtype="float32", attention_backend=backend)
    answers: dict[str, list[int]] = {}
    for rid, prompt in PROMPTS.items():
        worker.add(rid, prompt, num_tokens=NUM_TOKENS)
        (row,) = worker.step(Row(rid, len(prompt))).rows
        answers[rid] = [row.token_id]
    for _ in range(NUM_TOKENS - 1):
        for row in worker.step(*(Row(rid, 1) for rid in PROMPTS)).rows:
            answers[row.rid].append(row.token_id)
    return answers


def in_process_of_its_own(directory: Path, backend: str) -> dict[str, list[int]]:
    (directory / backend).mkdir()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(decode, (directory, backend))


@pytest.mark.filterwarnings("ignore")
def test_triton_attention_finds_the_tokens_of_a_request(tmp_path: Path) -> None:
    expected = in_process_of_its_own(tmp_path, "torch_native")
    assert all(len(set(tokens)) > 1 for tokens in expected.values())
    assert in_process_of_its_own(tmp_path, "triton") == expected
