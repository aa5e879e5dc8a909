"""SGLang's logprob tensors as the protocol's structs, position by position.

One of the files that know sglang.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sglmoe.protocol import TokenLogprobs
from sglmoe.worker.request import BatchRow


class PromptLogprobs:
    """Which prompt positions of an extend batch owe logprobs, and the answers.

    As in sglang, position p's logits give the logprob of token p + 1, so a row that computes positions [start, stop) answers
    for the tokens after each of them.
    """

    def __init__(self, rows: Sequence[BatchRow]):
        self.rows = rows
        # Relative to the row's start; the row's length where nothing is owed.
        self.starts = [
            min(max(row.request.next_logprob, row.start), row.stop) - row.start
            if row.request.next_logprob < row.request.num_prompt
            else row.stop - row.start
            for row in rows
        ]

    @property
    def any_owed(self) -> bool:
        return any(
            start < row.stop - row.start for start, row in zip(self.starts, self.rows, strict=True)
        )

    def next_token_ids(self) -> list[int]:
        """The token after each position that owes a logprob; 0 after the last one of a prompt."""
        ids: list[int] = []
        for row, start in zip(self.rows, self.starts, strict=True):
            first, last = row.start + start + 1, row.stop + 1
            known = row.request.tokens[first : min(last, row.request.num_prompt)]
            ids.extend(known)
            ids.extend([0] * (last - first - len(known)))
        return ids

    def answers(self, output: Any) -> list[tuple[TokenLogprobs, ...]]:
        """One tuple a row: the first position wanted has no logprob, those after it do."""
        if not self.any_owed:
            return [()] * len(self.rows)
        output.finalize_input_logprobs()
        values = output.input_token_logprobs.tolist()
        answers, offset = [], 0
        for index, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            count = row.stop - row.start - start
            answers.append(
                self._row_answers(output, index, row, start, values[offset : offset + count])
            )
            offset += count
        return answers

    def _row_answers(
        self, output: Any, index: int, row: BatchRow, start: int, values: list[float]
    ) -> tuple[TokenLogprobs, ...]:
        spec, tokens = row.request.spec.logprobs, row.request.tokens
        if spec is None or not values:
            return ()
        first = row.start + start
        answers = [TokenLogprobs(tokens[first], None)] if first == spec.start else []
        tops = as_lists(output.input_top_logprobs_val, index) if spec.num_top else None
        top_ids = as_lists(output.input_top_logprobs_idx, index) if spec.num_top else None
        picked = as_lists(output.input_token_ids_logprobs_val, index) if spec.token_ids else None
        for i in range(min(len(values), row.request.num_prompt - 1 - first)):
            answers.append(
                TokenLogprobs(
                    token_id=tokens[first + i + 1],
                    logprob=values[i],
                    top_logprobs=tuple(tops[i]) if tops else (),
                    top_ids=tuple(top_ids[i]) if top_ids else (),
                    picked_logprobs=tuple(picked[i]) if picked else (),
                )
            )
        return tuple(answers)


def output_logprobs(
    output: Any, rows: Sequence[BatchRow], token_ids: Sequence[int]
) -> list[TokenLogprobs | None]:
    """The logprobs of the sampled tokens, None for requests that did not ask."""
    if not any(row.request.spec.logprobs for row in rows):
        return [None] * len(rows)
    values = output.next_token_logprobs.tolist()
    answers: list[TokenLogprobs | None] = []
    for index, row in enumerate(rows):
        spec = row.request.spec.logprobs
        if spec is None:
            answers.append(None)
            continue
        tops = top_ids = picked = ()
        if spec.num_top:
            tops = tuple(as_list(output.next_token_top_logprobs_val[index]))
            top_ids = tuple(as_list(output.next_token_top_logprobs_idx[index]))
        if spec.token_ids:
            picked = tuple(as_list(output.next_token_token_ids_logprobs_val[index]))
        answers.append(TokenLogprobs(token_ids[index], values[index], tops, top_ids, picked))
    return answers


def as_list(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def as_lists(sequences: Any, index: int) -> list[list[Any]]:
    """One sequence's rows; sglang gives lists or tensors, by code path."""
    return [as_list(row) for row in sequences[index]]
