"""Routings of a layer, aligned to blocks as SGLang's `moe_align_block_size` does on a GPU."""

import msgspec
import torch
from hypothesis import strategies as st

GARBAGE = 0  # SGLang leaves what is not in use as it was: it may look like an expert


class Aligned(msgspec.Struct, frozen=True, eq=False):
    topk_ids: torch.Tensor  # [T, k]
    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    num_experts: int
    block_tokens: int

    @property
    def num_pairs(self) -> int:
        return self.topk_ids.numel()


def align(topk_ids: torch.Tensor, block_tokens: int, num_experts: int) -> Aligned:
    """Pairs sorted by expert, ids that are none (negative) first, as a run of its own whose blocks have the id -1."""
    num_pairs = topk_ids.numel()
    most = num_pairs + (num_experts + 1) * (block_tokens - 1)
    if num_pairs < num_experts + 1:
        most = num_pairs * block_tokens
    most = (most + 3) // 4 * 4
    rows: list[int] = []
    owners: list[int] = []
    flat = topk_ids.flatten().tolist()
    for expert in range(-1, num_experts):
        run = [pair for pair, its in enumerate(flat) if its == expert]
        run += [num_pairs] * (-len(run) % block_tokens)
        rows += run
        owners += [expert] * (len(run) // block_tokens)
    num_blocks = -(-most // block_tokens)
    return Aligned(
        topk_ids=topk_ids.to(torch.int32),
        sorted_ids=padded(rows, num_pairs, most),
        expert_ids=padded(owners, GARBAGE, num_blocks),
        num_padded=torch.tensor([len(rows)], dtype=torch.int32),
        num_experts=num_experts,
        block_tokens=block_tokens,
    )


def padded(values: list[int], filler: int, length: int) -> torch.Tensor:
    return torch.tensor(values + [filler] * (length - len(values)), dtype=torch.int32)


@st.composite
def routings(draw: st.DrawFn, max_tokens: int = 9) -> Aligned:
    """One token or several, experts that nobody chose, up to all experts for each token, and padding tokens (-1)."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, max_tokens))
    choice = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    token = st.one_of(choice, st.just([-1] * top_k))
    ids = draw(st.lists(token, min_size=num_tokens, max_size=num_tokens))
    return align(torch.tensor(ids), draw(st.sampled_from([4, 16])), num_experts)
