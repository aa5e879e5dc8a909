"""What attention and KV kernels for CUDA go by, and a CPU's do not: SGLang's translator of KV ids, the pool's size."""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork
from loaded_worker import LoadedWorker

pytestmark = pytest.mark.usefixtures("preloaded")


def check_lookup(model_dir: Path) -> None:
    loaded = LoadedWorker(model_dir, dtype="float32").loaded
    runner, its = loaded.runner, loaded.geometry
    # Triton and FlashInfer gather ids from this table; FA3 from that of the backend.
    assert runner.kv_index_translator.req_to_token is runner.req_to_token_pool.req_to_token
    assert runner.attn_backend.kv_index_translator is runner.kv_index_translator
    assert runner.attn_backend.req_to_token_pool is runner.req_to_token_pool
    # The last token of the last page; beyond `limit` storing it would stop the device.
    pool, num_pages = runner.token_to_kv_pool, its.num_frames * its.pages_per_frame
    last_id = (its.padding_pages + num_pages - 1) * its.page_rows + its.page_tokens - 1
    limit = pool.size + pool.page_size
    assert last_id < limit
    buffers = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    assert all(limit <= len(buffer) for buffer in buffers)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_kernels_for_cuda_find_our_token_table_and_all_of_the_arena(
    family: str, tmp_path: Path
) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype="float32")
    run_in_fork(check_lookup, model_dir)
