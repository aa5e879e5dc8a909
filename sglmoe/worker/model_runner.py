"""Forward passes: rows of requests become a batch of sglang's, logits become tokens.

Owns the token table and the sampling state. Which page or frame holds what is the `MemoryManager`'s to say.

One of the files that know sglang.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.runtime_context import get_model, get_serving
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglmoe.protocol import RoutedExperts
from sglmoe.worker.model_runner_graphs import FullGraphs
from sglmoe.worker.model_runner_loading import Loaded
from sglmoe.worker.model_runner_logprobs import PromptLogprobs, output_logprobs
from sglmoe.worker.prefetching import Prefetching
from sglmoe.worker.recorder import Recorder
from sglmoe.worker.request import BatchRow, WorkerRequest
from sglmoe.worker.sampling import (
    GrammarCompiler,
    SamplingGroup,
    SamplingState,
    make_grammar_backend,
)
from sglmoe.worker.worker import RowOutput


class ModelRunner:
    """The worker's `Model` on sglang."""

    def __init__(self, loaded: Loaded, server_args: Any):
        self._runner = loaded.runner
        self._experts = loaded.experts
        self._full_graphs = FullGraphs(loaded.runner, loaded.captured)
        self._device = loaded.runner.device
        self._table = loaded.runner.req_to_token_pool.req_to_token
        config = loaded.runner.model_config
        self.vocab_size: int = config.vocab_size
        self._num_layers: int = config.num_hidden_layers
        tokenizer = load_tokenizer(config)
        self._sampling = SamplingState(
            vocab_size=config.vocab_size,
            device=self._device,
            tokenizer=tokenizer,
            eos_token_ids=config.hf_eos_token_id,
            penalizes_late=not server_args.disable_overlap_schedule,
        )
        self._grammars = GrammarCompiler(make_grammar_backend(server_args, config, tokenizer))
        self.recorder: Recorder | None = None  # of a routing trace, while one is recorded
        self.prefetching: Prefetching | None = None

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, request: WorkerRequest) -> str | None:
        """Take a request in. Its grammar's error or "" if that is known; None without one, or if `ready_grammars` will tell."""
        return self._grammars.start(self._sampling.add(request))

    def ready_grammars(self) -> Iterator[tuple[str, str]]:
        return self._grammars.finished()

    @property
    def has_pending_grammars(self) -> bool:
        return self._grammars.has_pending

    def forget(self, rid: str) -> None:
        self._grammars.forget(rid)
        self._sampling.forget(rid)
        if self.prefetching is not None:
            self.prefetching.forget(rid)

    # ------------------------------------------------------------------------------------------------ token table

    def write_token_ids(self, table_row: int, start: int, token_ids: np.ndarray) -> None:
        ids = torch.from_numpy(token_ids).to(self._device)
        self._table[table_row, start : start + len(token_ids)] = ids

    def write_decode_ids(
        self, table_rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        rows, columns, ids = self._tensor([table_rows, positions, token_ids])
        self._table[rows, columns] = ids.to(torch.int32)

    # ------------------------------------------------------------------------------------------------ forward

    @torch.inference_mode()
    def forward(self, rows: Sequence[BatchRow]) -> list[RowOutput]:
        """Compute the rows and sample where one is complete; one output a row, in the same order."""
        order, group = self._arrange(rows)
        num_sampling = len(group.requests) if group else 0
        batch, prompt = self._batch(order)
        returns_routing = any(row.request.next_routed is not None for row in order)
        traces = self.recorder is not None
        self._experts.record_routing(returns_routing or traces, with_logits=traces)
        self._experts.num_tokens = len(batch.input_ids)
        started = time.perf_counter()
        with self._full_graphs.begin(batch, may_replay=not traces) as replay:
            output = self._runner.forward(batch).logits_output
            if replay is not None:
                replay.queued()
                replay.watch()
                if returns_routing:
                    self._experts.replayed(replay.routing())
            if self.recorder is not None:
                self._record(self.recorder, order, time.perf_counter() - started)
            prompt_logprobs = prompt.answers(output)
            routed = self._routed_experts(order) if returns_routing else [None] * len(order)
            sampled = self._sample(output, batch, order[:num_sampling], group) if group else []
        if self.prefetching is not None:
            self.prefetching.look_ahead()  # for the next step
        outputs = {
            row.request.rid: RowOutput(
                token_id=sampled[i].token_id if i < num_sampling else None,
                logprobs=sampled[i].logprobs if i < num_sampling else None,
                prompt_logprobs=prompt_logprobs[i],
                routed_experts=routed[i],
                grammar_done=i < num_sampling and sampled[i].grammar_done,
                error=sampled[i].error if i < num_sampling else "",
            )
            for i, row in enumerate(order)
        }
        return [outputs[row.request.rid] for row in rows]

    def _arrange(self, rows: Sequence[BatchRow]) -> tuple[list[BatchRow], SamplingGroup | None]:
        """Rows that sample first, in the order of their sampling group."""
        sampling = {row.request.rid: row for row in rows if row.samples}
        others = [row for row in rows if not row.samples]
        if not sampling:
            return others, None
        group = self._sampling.group(list(sampling))
        return [sampling[request.rid] for request in group.requests] + others, group

    def _batch(self, rows: Sequence[BatchRow]) -> tuple[ForwardBatch, PromptLogprobs]:
        prompt = PromptLogprobs(rows)
        decode = all(row.decodes for row in rows)
        stops = [row.stop for row in rows]
        table_rows = [row.request.table_row for row in rows]
        token_ids, positions, owners = flatten(rows)
        if self.prefetching is not None:
            rids = [row.request.rid for row in rows]
            self.prefetching.begin_step(
                rids, token_ids=token_ids, positions=positions, owners=owners
            )
        row_indices, seq_lens = self._tensor([table_rows, stops])
        token_positions = torch.from_numpy(positions).to(self._device)
        owner_rows = row_indices[torch.from_numpy(owners).to(self._device)]
        specs = [row.request.spec.logprobs for row in rows]
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(rows),
            input_ids=torch.from_numpy(token_ids).to(self._device),
            req_pool_indices=row_indices,
            seq_lens=seq_lens,
            out_cache_loc=self._table[owner_rows, token_positions].to(torch.int64),
            seq_lens_sum=sum(stops),
            seq_lens_cpu=torch.tensor(stops),
            orig_seq_lens=seq_lens.to(torch.int32),
            positions=token_positions,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            return_logprob=any(specs),
            top_logprobs_nums=[spec.num_top if spec else 0 for spec in specs],
            token_ids_logprobs=[
                list(spec.token_ids) if spec and spec.token_ids else None for spec in specs
            ],
        )
        if not decode:
            self._set_extend_fields(batch, rows, prompt)
        self._runner.kv_index_translator.bind_own_plan(batch)  # attention kernels of GPUs go by it
        return batch, prompt

    def _set_extend_fields(
        self, batch: ForwardBatch, rows: Sequence[BatchRow], prompt: PromptLogprobs
    ) -> None:
        starts = [row.start for row in rows]
        lengths = [row.stop - row.start for row in rows]
        offsets = [0, *accumulate(lengths[:-1])]
        prefix_lens, extend_lens, start_locs = self._tensor(
            [starts, lengths, offsets], dtype=torch.int32
        )
        batch.extend_num_tokens = sum(lengths)
        batch.extend_seq_lens, batch.extend_seq_lens_cpu = extend_lens, lengths
        batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = prefix_lens, starts
        batch.extend_start_loc = start_locs
        batch.extend_logprob_start_lens_cpu = prompt.starts
        if batch.return_logprob:
            batch.extend_input_logprob_token_ids_gpu = self._tensor(prompt.next_token_ids())

    def _sample(
        self, output: Any, batch: ForwardBatch, rows: Sequence[BatchRow], group: SamplingGroup
    ) -> list[RowOutput]:
        """Sample the first `len(rows)` rows of the batch; what sglang samples from is what they alone need."""
        if len(rows) < batch.batch_size:
            keep_first(output, batch, len(rows))
        batch.sampling_info = group.info
        token_ids = self._runner.sample(output, batch).tolist()
        group.sampled(token_ids)
        logprobs = output_logprobs(output, rows, token_ids)
        accepted = group.accept(token_ids)
        return [
            RowOutput(token_id=token_id, logprobs=logprob, grammar_done=done, error=error)
            for token_id, logprob, (done, error) in zip(token_ids, logprobs, accepted, strict=True)
        ]

    def _routed_experts(self, rows: Sequence[BatchRow]) -> list[RoutedExperts | None]:
        """The routing of each row's tokens that its request still waits for."""
        ids = self._experts.routing(self._num_layers).cpu().numpy()
        answers: list[RoutedExperts | None] = []
        offset = 0
        for row in rows:
            length = row.stop - row.start
            wanted = row.request.next_routed
            if wanted is None or wanted >= row.stop:
                answers.append(None)
            else:
                part = ids[offset + max(wanted - row.start, 0) : offset + length]
                answers.append(RoutedExperts(shape=part.shape, ids=part.tobytes()))
            offset += length
        return answers

    def _record(self, recorder: Recorder, rows: Sequence[BatchRow], seconds: float) -> None:
        expert_ids, probabilities = self._experts.trace()
        token_ids, positions, owners = flatten(rows)
        recorder.forward(
            [row.request.rid for row in rows],
            token_ids=token_ids,
            positions=positions,
            owners=owners,
            expert_ids=expert_ids.cpu().numpy(),
            probabilities=probabilities.cpu().numpy(),
            seconds=seconds,
        )

    def _tensor(self, values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def flatten(rows: Sequence[BatchRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, positions and row numbers of all tokens of a batch, int64."""
    ids = [
        np.frombuffer(row.request.tokens, dtype=np.int32)[row.start : row.stop].astype(np.int64)
        for row in rows
    ]
    positions = [np.arange(row.start, row.stop) for row in rows]
    owners = np.repeat(np.arange(len(rows)), [row.stop - row.start for row in rows])
    return np.concatenate(ids), np.concatenate(positions), owners


def keep_first(output: Any, batch: ForwardBatch, num_rows: int) -> None:
    """Cut a batch that has run down to the rows that sample."""
    output.next_token_logits = output.next_token_logits[:num_rows]
    batch.seq_lens = batch.seq_lens[:num_rows]
    batch.top_logprobs_nums = batch.top_logprobs_nums[:num_rows]
    batch.token_ids_logprobs = batch.token_ids_logprobs[:num_rows]


def load_tokenizer(model_config: Any) -> Any:
    """The tokenizer that grammars and end-of-sequence ids refer to; None with --skip-tokenizer-init.

    As sglang's scheduler does, also tells `model_config` which tokens end a reasoning.
    """
    serving, model = get_serving(), get_model()
    if serving.skip_tokenizer_init:
        return None
    tokenizer = get_tokenizer(
        serving.tokenizer_path,
        tokenizer_mode=serving.tokenizer_mode,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        tokenizer_backend=serving.tokenizer_backend,
    )
    if serving.reasoning_parser:
        detector = ReasoningParser(
            model_type=serving.reasoning_parser, stream_reasoning=False, tokenizer=tokenizer
        ).detector
        model_config.think_end_ids = detector.get_think_end_token_ids(tokenizer) or None
    return tokenizer
