"""He's routing path predictor: a small T5 that reads tokens and says which experts they will take.

"ExpertFlow" (He et al., arXiv 2410.17954), section 3. The encoder reads a request's prompt, the
decoder what was generated, up to the token whose path is asked; one head gives all layers at once.
The paper says nothing of the prompt's own tokens: here the same head reads the encoder's states.
Knows nothing of requests and steps: `routing_path.py` does.
"""

import math

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BUCKETS = 32  # of distances; both as in T5 (Raffel et al. 2020, section 2.1)
MAX_DISTANCE = 128


class Dimensions(msgspec.Struct, frozen=True):
    """What decides the shapes of the model's tensors.

    `d_model` and `d_ff` are the paper's. The rest was tried on a small served model: a second block
    brought half a point of recall for twice the time, and longer windows brought less.
    """

    num_layers: int  # of the served model, that have experts
    num_experts: int
    vocab_size: int
    d_model: int = 32
    d_ff: int = 2048
    d_kv: int = 16
    num_heads: int = 4
    num_blocks: int = 1  # of the encoder, and as many of the decoder
    prompt_tokens: int = 256  # the encoder reads the last of a longer prompt
    window_tokens: int = 16  # what the decoder attends to: the token itself and those before it


class Attention(nn.Module):
    """T5's: no biases, and no scale by sqrt(d_kv), which the first weights have in them.

    What a block adds begins at 0, other than T5's: a token's own row is the best part of its path.
    """

    def __init__(self, its: Dimensions):
        super().__init__()
        self._heads = (its.num_heads, its.d_kv)
        inner = its.num_heads * its.d_kv
        self.query = linear(its.d_model, inner, std=(its.d_model * its.d_kv) ** -0.5)
        self.key = linear(its.d_model, inner)
        self.value = linear(its.d_model, inner)
        self.output = linear(inner, its.d_model, std=0.0)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, d_model] -> twice [B, heads, T, d_kv]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Of queries [B, T, d_model]; bias [B, heads, T, S], or 1 for any of the first three."""
        weights = (self._split(self.query(x)) @ keys.transpose(2, 3) + bias).softmax(dim=-1)
        return self.output((weights @ values).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, self._heads).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, its: Dimensions):
        super().__init__()
        self.norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.up = linear(its.d_model, its.d_ff)
        self.down = linear(its.d_ff, its.d_model, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class EncoderBlock(nn.Module):
    def __init__(self, its: Dimensions):
        super().__init__()
        self.norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.attention = Attention(its)
        self.feed_forward = FeedForward(its)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, *self.attention.keys_and_values(normed), bias)
        return self.feed_forward(x)


class DecoderBlock(nn.Module):
    def __init__(self, its: Dimensions):
        super().__init__()
        self.norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.attention = Attention(its)
        self.cross_norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.cross_attention = Attention(its)
        self.feed_forward = FeedForward(its)


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, added to attention's logits."""

    def __init__(self, its: Dimensions, *, both_ways: bool):
        super().__init__()
        self._both_ways = both_ways
        self.table = nn.Parameter(torch.randn(its.num_heads, NUM_BUCKETS) * its.d_model**-0.5)

    def forward(self, distances: Tensor) -> Tensor:
        """From the query back to the key, whole numbers of any shape [...] -> [heads, ...]."""
        return self.table[:, bucket_of(distances, both_ways=self._both_ways)]


class RoutingPathModel(nn.Module):
    """Logits [..., num_layers * num_experts] of tokens' experts. All token ids are int64."""

    def __init__(self, its: Dimensions):
        super().__init__()
        self.dimensions = its
        self.embedding = nn.Embedding(its.vocab_size, its.d_model)
        self.encoder_bias = RelativeBias(its, both_ways=True)
        self.decoder_bias = RelativeBias(its, both_ways=False)
        self.encoder = nn.ModuleList(EncoderBlock(its) for _ in range(its.num_blocks))
        self.decoder = nn.ModuleList(DecoderBlock(its) for _ in range(its.num_blocks))
        self.encoder_norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.decoder_norm = nn.RMSNorm(its.d_model, eps=1e-6)
        self.head = linear(its.d_model, its.num_layers * its.num_experts)

    def encode(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """States [B, P, d_model] of prompts [B, P], of which the first `lengths` [B] tokens are there."""
        places = torch.arange(prompts.shape[1])
        bias = self.encoder_bias(places[:, None] - places[None, :]) + absent(lengths, len(places))
        x = self.embedding(prompts)
        for block in self.encoder:
            x = block(x, bias)
        return self.encoder_norm(x)

    def decode(self, tokens: Tensor, prompt_states: Tensor, lengths: Tensor) -> Tensor:
        """States [B, G, d_model] of generated tokens [B, G], all at once: each sees no later one."""
        places = torch.arange(tokens.shape[1])
        distances = places[:, None] - places[None, :]
        seen = (distances >= 0) & (distances < self.dimensions.window_tokens)
        bias = self.decoder_bias(distances).masked_fill(~seen, -math.inf)
        cross_bias = absent(lengths, prompt_states.shape[1])
        x = self.embedding(tokens)
        for block in self.decoder:
            normed = block.norm(x)
            x = x + block.attention(normed, *block.attention.keys_and_values(normed), bias)
            prompt = block.cross_attention.keys_and_values(prompt_states)
            x = x + block.cross_attention(block.cross_norm(x), *prompt, cross_bias)
            x = block.feed_forward(x)
        return self.decoder_norm(x)


def absent(lengths: Tensor, num_places: int) -> Tensor:
    """[B, 1, 1, num_places]: 0 for the first `lengths` [B] of them, -inf for the rest."""
    beyond = torch.arange(num_places) >= lengths[:, None]
    return torch.zeros(beyond.shape).masked_fill(beyond, -math.inf)[:, None, None, :]


def bucket_of(distances: Tensor, *, both_ways: bool) -> Tensor:
    """T5's: half of the buckets for a distance each, the rest growing with its logarithm.

    `both_ways`: half of all for keys behind the query. Otherwise these all count as distance 0.
    """
    num_buckets = NUM_BUCKETS // 2 if both_ways else NUM_BUCKETS
    behind = (distances < 0).long() * num_buckets if both_ways else 0
    distances = distances.abs() if both_ways else distances.clamp(min=0)
    num_exact = num_buckets // 2
    growth = (distances.clamp(min=1).float() / num_exact).log() / math.log(MAX_DISTANCE / num_exact)
    far = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return behind + torch.where(distances < num_exact, distances, far)


def linear(num_in: int, num_out: int, std: float | None = None) -> nn.Linear:
    """Weights that keep the variance of what goes in, or of this deviation."""
    layer = nn.Linear(num_in, num_out, bias=False)
    nn.init.normal_(layer.weight, std=num_in**-0.5 if std is None else std)
    return layer
