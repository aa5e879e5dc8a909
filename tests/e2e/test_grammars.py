"""Compiled grammars: how many are kept of those that requests bring along."""

import pytest
from forking import run_in_fork

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.protocol import NewRequest

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_MORE = 40  # than are kept
CACHE_BYTES = 1 << 20


def compile_one_after_the_other() -> tuple[int, list[int], list[int]]:
    """Grammars kept at most, and after each request with another one: those kept, and bytes that xgrammar keeps beside."""
    import msgspec
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from sglmoe.worker.request import WorkerRequest
    from sglmoe.worker.sampling import (
        MAX_GRAMMARS,
        GrammarCompiler,
        SamplingRequest,
        limit_compiler,
    )

    tokenizer = get_tokenizer(str(DEMO_MODEL))
    backend = XGrammarGrammarBackend(tokenizer, vocab_size=2048, model_eos_token_ids=[1])
    limit_compiler(backend, CACHE_BYTES)
    compiler = GrammarCompiler(backend)

    def compile_it(number: int) -> SamplingRequest:
        sampling = msgspec.msgpack.encode(SamplingParams(regex=f"a{{{number}}}b"))
        spec = NewRequest(str(number), b"", b"", sampling, 8, "", None, None, False)
        request = SamplingRequest(WorkerRequest(spec), tokenizer=tokenizer, eos_token_ids={1})
        assert compiler.start(request) is None
        while compiler.has_pending:
            assert all(error == "" for _, error in compiler.finished())
        assert request.grammar is not None
        return request

    counts, sizes = [], []
    for number in range(1, MAX_GRAMMARS + NUM_MORE + 1):
        compile_it(number)
        counts.append(len(backend.cache))
        sizes.append(backend.grammar_compiler.get_cache_size_bytes())
    compile_it(1)  # it was forgotten, and can be asked for again
    return MAX_GRAMMARS, counts, sizes


def test_a_client_that_asks_for_another_grammar_each_time_does_not_fill_memory() -> None:
    most, counts, sizes = run_in_fork(compile_one_after_the_other)
    assert counts == [*range(1, most + 1), *range(1, NUM_MORE + 1)]
    assert CACHE_BYTES / 2 < max(sizes) <= CACHE_BYTES
