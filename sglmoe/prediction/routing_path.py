"""He's routing path predictor at work: requests come and go, each step brings their next tokens."""

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.prediction.routing_path_decoder import IncrementalDecoder
from sglmoe.prediction.routing_path_model import Dimensions, RoutingPathModel
from sglmoe.prediction.saved import Tensors

# Arbitrary: of more requests that nobody has told to forget, the one idle longest is forgotten. With the
# default dimensions each has 136 KiB of keys and values.
MAX_REQUESTS = 1024


class Part(Enum):
    """What a step's tokens of a request are to the model, judged by what predictors are told."""

    NEW_PROMPT = 0
    MORE_PROMPT = 1
    GENERATED = 2


def part_of(next_position: int | None, position: int, num_tokens: int) -> Part:
    """`next_position`: behind what was seen of the request, None for a new one; `position`: the first one's.

    Tokens from before that begin the request anew: it was preempted. Where some are missing, in a step
    that the predictor was not told of, it goes on without. A prompt's last chunk of one token counts
    as generated.
    """
    if next_position is None or position < next_position:
        return Part.NEW_PROMPT
    return Part.MORE_PROMPT if num_tokens > 1 else Part.GENERATED


def runs_of(owners: npt.NDArray[np.int32]) -> Iterator[tuple[int, slice]]:
    """Each owner in a step, and where its tokens are."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1)).tolist() if len(owners) else []
    for start, stop in pairwise([*starts, len(owners)]):
        yield int(owners[start]), slice(start, stop)


class Request:
    """What is known of a request: where it stands, its prompt's end, and its row in the decoder."""

    def __init__(self, row: int):
        self.row = row
        self.next_position: int | None = None
        self.prompt: npt.NDArray[np.int32] = np.empty(0, np.int32)


class RoutingPath:
    """Predicts all layers of a step before its first. Whatever the layers then do changes nothing.

    The encoder reads the last `prompt_tokens` of a prompt, and again whenever more of it arrives. Of
    a prompt whose beginning was found in the KV cache it reads the rest: predictions are worse then.
    The decoder sees the last `window_tokens` that were generated.
    """

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, model: RoutingPathModel):
        its = model.dimensions
        self._model = model.eval()
        self._shape = (its.num_layers, its.num_experts)
        self._prompt_tokens = its.prompt_tokens
        self._vocab_size = its.vocab_size
        with torch.inference_mode():
            self._decoder = IncrementalDecoder(model)
        self._requests: dict[int, Request] = {}  # the one idle longest first
        self._scores: Scores = np.zeros(self._shape, np.float32)

    @property
    def num_rows(self) -> int:
        """Requests that there is memory for."""
        return self._decoder.num_rows

    def begin_step(self, tokens: StepTokens) -> None:
        with torch.inference_mode():
            self._scores = 1 - self._unused_by_step(tokens)

    def observe(self, routing: LayerRouting) -> None:
        """Nothing is learned while serving."""

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        request = self._requests.pop(owner, None)
        if request is not None:
            self._decoder.give_back(request.row)

    def _unused_by_step(self, tokens: StepTokens) -> Scores:
        """[num_layers, num_experts]: how likely it is that none of the tokens uses an expert."""
        # Placeholders of images are beyond the vocabulary: any token will do.
        ids = np.where(tokens.token_ids < self._vocab_size, tokens.token_ids, 0)
        unused = np.ones(self._shape, np.float32)
        generated: list[tuple[int, int]] = []  # row, token id
        for owner, run in runs_of(tokens.owners):
            request = self._request(owner)
            position, num_tokens = int(tokens.positions[run.start]), run.stop - run.start
            part = part_of(request.next_position, position, num_tokens)
            request.next_position = position + num_tokens
            if part is Part.GENERATED:
                generated.append((request.row, int(ids[run.start])))
                continue
            before = request.prompt if part is Part.MORE_PROMPT else request.prompt[:0]
            request.prompt = np.concatenate([before, ids[run]])[-self._prompt_tokens :]
            unused *= self._unused(self._read(request)[-num_tokens:])
        if generated:
            rows, next_ids = torch.tensor(sorted(generated)).T
            unused *= self._unused(self._decoder.advance(rows, next_ids))
        return unused

    def _request(self, owner: int) -> Request:
        request = self._requests.pop(owner, None)
        if request is None:
            if len(self._requests) == MAX_REQUESTS:
                self.forget(next(iter(self._requests)))
            request = Request(self._decoder.take())
        self._requests[owner] = request
        return request

    def _read(self, request: Request) -> Tensor:
        """States of the prompt's tokens, which the decoder sees from now on."""
        prompt = torch.from_numpy(request.prompt.astype(np.int64))
        states: Tensor = self._model.encode(prompt[None], torch.tensor([len(prompt)]))[0]
        self._decoder.begin(request.row, states)
        return states

    def _unused(self, states: Tensor) -> Scores:
        """The same of these tokens, whose states are [T, d_model]."""
        by_token = torch.sigmoid(-self._model.head(states)).numpy()
        unused: Scores = np.multiply.reduce(by_token, axis=0)
        return unused.reshape(self._shape)


def to_saved(model: RoutingPathModel) -> tuple[dict[str, Any], Tensors]:
    """Its settings, and its tensors in half precision: the embedding of a large vocabulary is most of it."""
    tensors = {name: its.detach().half().numpy() for name, its in model.state_dict().items()}
    return msgspec.structs.asdict(model.dimensions), tensors


def from_saved(settings: Mapping[str, Any], tensors: Tensors) -> RoutingPath:
    """Computes in single precision."""
    model = RoutingPathModel(Dimensions(**settings))
    model.load_state_dict({name: torch.from_numpy(its).float() for name, its in tensors.items()})
    return RoutingPath(model)
