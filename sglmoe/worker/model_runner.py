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

from sglmoe.memory.small_copies import on_device, rows_on_device
from sglmoe.protocol import RoutedExperts
from sglmoe.worker.captured_steps import CapturedSteps
from sglmoe.worker.model_runner_graphs import FullGraphs
from sglmoe.worker.model_runner_loading import Loaded
from sglmoe.worker.model_runner_logprobs import PromptLogprobs, output_logprobs
from sglmoe.worker.model_runner_passes import ReplayedPass, is_plain
from sglmoe.worker.prefetching import Prefetching
from sglmoe.worker.recorder import Recorder
from sglmoe.worker.request import BatchRow, WorkerRequest
from sglmoe.worker.sampling import (
    GrammarCompiler,
    SamplingGroup,
    SamplingState,
    make_grammar_backend,
)
from sglmoe.worker.seams import Done, Pass, RowOutput


class ModelRunner:
    """The worker's `Model` on sglang."""

    def __init__(self, loaded: Loaded, server_args: Any):
        self._runner = loaded.runner
        self._experts = loaded.experts
        self._full_graphs = FullGraphs(loaded.runner, loaded.captured)
        self._overlaps: bool = not server_args.disable_overlap_schedule
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
            penalizes_late=self._overlaps,
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
        ids = on_device(token_ids, self._device, torch.int32)
        self._table[table_row, start : start + len(token_ids)] = ids

    def write_decode_ids(
        self, table_rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        fields = [list(table_rows), list(positions), list(token_ids)]
        rows, columns, ids = rows_on_device(fields, self._device)
        self._table[rows, columns] = ids.to(torch.int32)

    # ------------------------------------------------------------------------------------------------ forward

    @property
    def num_behind(self) -> int:
        """See `Model.num_behind`."""
        is_watched = self.recorder is not None or self.prefetching is not None
        return self._full_graphs.num_behind if self._overlaps and not is_watched else 0

    @torch.inference_mode()
    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        """Compute the rows and sample where one is complete."""
        order, group = self._arrange(rows)
        batch, prompt = self._batch(order)
        returns_routing = any(row.request.next_routed is not None for row in order)
        traces = self.recorder is not None
        self._experts.record_routing(returns_routing or traces, with_logits=traces)
        self._experts.num_tokens = len(batch.input_ids)
        started = time.perf_counter()
        replay = self._full_graphs.lend(batch, may_replay=not traces)
        output = self._runner.forward(batch).logits_output
        if replay is not None:
            replay.queued()
            replay.watch()
            if group and self.num_behind and is_plain(order, group):
                return self._replayed(rows, order, output, batch, group, replay)
            if returns_routing:
                self._experts.replayed(replay.routing())
        if self.recorder is not None:
            self._record(self.recorder, order, time.perf_counter() - started)
        prompt_logprobs = prompt.answers(output)
        routed = self._routed_experts(order) if returns_routing else [None] * len(order)
        sampled = self._sampled(output, batch, order, group) if group else []
        if replay is not None:
            replay.take_back()
        if self.prefetching is not None:
            self.prefetching.look_ahead()  # for the next step
        num_sampling = len(sampled)
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
        return Done([outputs[row.request.rid] for row in rows])

    @torch.inference_mode()
    def follow(self, rows: Sequence[BatchRow], before: Pass) -> Pass:
        """See `Model.follow`."""
        assert isinstance(before, ReplayedPass)
        order = before.in_order(rows)
        batch = self._decode_batch(order, input_ids=before.token_ids)
        before.steps.go_on(len(order))
        output = self._runner.forward(batch).logits_output
        before.steps.queued()
        return self._replayed(rows, order, output, batch, before.group, before.steps)

    def _arrange(self, rows: Sequence[BatchRow]) -> tuple[list[BatchRow], SamplingGroup | None]:
        """Rows that sample first, in the order of their sampling group."""
        sampling = {row.request.rid: row for row in rows if row.samples}
        others = [row for row in rows if not row.samples]
        if not sampling:
            return others, None
        group = self._sampling.group(list(sampling))
        return [sampling[request.rid] for request in group.requests] + others, group

    def _batch(self, rows: Sequence[BatchRow]) -> tuple[ForwardBatch, PromptLogprobs]:
        if self.prefetching is not None:
            token_ids, positions, owners = flatten(rows)
            rids = [row.request.rid for row in rows]
            self.prefetching.begin_step(
                rids, token_ids=token_ids, positions=positions, owners=owners
            )
        prompt = PromptLogprobs(rows)
        if all(row.decodes for row in rows):
            return self._decode_batch(rows), prompt
        return self._extend_batch(rows, prompt), prompt

    def _decode_batch(
        self, rows: Sequence[BatchRow], *, input_ids: torch.Tensor | None = None
    ) -> ForwardBatch:
        """`input_ids`: what the rows compute, int `[rows]`, where the host does not know it yet."""
        fields = [
            [row.request.table_row for row in rows],
            [row.stop for row in rows],
            [row.start for row in rows],
            [row.request.tokens[row.start] for row in rows],
        ]
        table_rows, seq_lens, positions, token_ids = rows_on_device(fields, self._device)
        if input_ids is not None:
            token_ids = input_ids.to(torch.int64)
        return self._filled(
            ForwardMode.DECODE,
            rows,
            table_rows=table_rows,
            seq_lens=seq_lens,
            input_ids=token_ids,
            positions=positions,
            out_cache_loc=self._table[table_rows, positions].to(torch.int64),
        )

    def _extend_batch(self, rows: Sequence[BatchRow], prompt: PromptLogprobs) -> ForwardBatch:
        token_ids, positions, owners = flatten(rows)
        fields = [[row.request.table_row for row in rows], [row.stop for row in rows]]
        table_rows, seq_lens = rows_on_device(fields, self._device)
        token_positions = on_device(positions, self._device)
        owner_rows = table_rows[on_device(owners, self._device)]
        batch = self._filled(
            ForwardMode.EXTEND,
            rows,
            table_rows=table_rows,
            seq_lens=seq_lens,
            input_ids=on_device(token_ids, self._device),
            positions=token_positions,
            out_cache_loc=self._table[owner_rows, token_positions].to(torch.int64),
        )
        self._set_extend_fields(batch, rows, prompt)
        return batch

    def _filled(
        self,
        mode: ForwardMode,
        rows: Sequence[BatchRow],
        *,
        table_rows: torch.Tensor,
        seq_lens: torch.Tensor,
        **fields: torch.Tensor,
    ) -> ForwardBatch:
        specs = [row.request.spec.logprobs for row in rows]
        stops = [row.stop for row in rows]
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            req_pool_indices=table_rows,
            seq_lens=seq_lens,
            seq_lens_sum=sum(stops),
            seq_lens_cpu=torch.tensor(stops),
            orig_seq_lens=seq_lens.to(torch.int32),
            capture_hidden_mode=CaptureHiddenMode.NULL,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            return_logprob=any(specs),
            top_logprobs_nums=[spec.num_top if spec else 0 for spec in specs],
            token_ids_logprobs=[
                list(spec.token_ids) if spec and spec.token_ids else None for spec in specs
            ],
            **fields,
        )
        self._runner.kv_index_translator.bind_own_plan(batch)  # attention kernels of GPUs go by it
        return batch

    def _set_extend_fields(
        self, batch: ForwardBatch, rows: Sequence[BatchRow], prompt: PromptLogprobs
    ) -> None:
        starts = [row.start for row in rows]
        lengths = [row.stop - row.start for row in rows]
        offsets = [0, *accumulate(lengths[:-1])]
        prefix_lens, extend_lens, start_locs = (
            its.to(torch.int32) for its in rows_on_device([starts, lengths, offsets], self._device)
        )
        batch.extend_num_tokens = sum(lengths)
        batch.extend_seq_lens, batch.extend_seq_lens_cpu = extend_lens, lengths
        batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = prefix_lens, starts
        batch.extend_start_loc = start_locs
        batch.extend_logprob_start_lens_cpu = prompt.starts
        if batch.return_logprob:
            batch.extend_input_logprob_token_ids_gpu = on_device(
                prompt.next_token_ids(), self._device
            )

    def _sample(self, output: Any, batch: ForwardBatch, group: SamplingGroup) -> torch.Tensor:
        """A token for each of the group's rows, which are the first of the batch: int `[rows]`, on the device. What sglang
        samples from is what they alone need."""
        if len(group.requests) < batch.batch_size:
            keep_first(output, batch, len(group.requests))
        batch.sampling_info = group.info
        token_ids: torch.Tensor = self._runner.sample(output, batch)
        return token_ids

    def _replayed(
        self,
        rows: Sequence[BatchRow],
        order: Sequence[BatchRow],
        output: Any,
        batch: ForwardBatch,
        group: SamplingGroup,
        steps: CapturedSteps,
    ) -> ReplayedPass:
        """What has been queued, with what it samples."""
        token_ids = self._sample(output, batch, group)
        logprobs = output.next_token_logprobs if batch.return_logprob else None
        return ReplayedPass(
            rows, order, group=group, token_ids=token_ids, logprobs=logprobs, steps=steps
        )

    def _sampled(
        self, output: Any, batch: ForwardBatch, order: Sequence[BatchRow], group: SamplingGroup
    ) -> list[RowOutput]:
        """What the group's rows have sampled, and all that is told of it."""
        token_ids = self._sample(output, batch, group).tolist()
        group.sampled(token_ids)
        logprobs = output_logprobs(output, order[: len(token_ids)], token_ids)
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
