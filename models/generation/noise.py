"""Random numbers of sampled generation, as pure functions of a request's key and of the codes.

Every beam carries a *stream*: a hash of its request's key and of the codes that it consists of. So
a draw depends neither on the batch around a request, nor on the other beams, nor on how the trie
numbers its states, and the same request asked again with another allow-list meets the same noise.

Shape legend: N requests, S samples; ``...`` any shape.
"""

import torch
from torch import Tensor

from models.ops.hashing import GOLDEN_32, GOLDEN_64, as_signed, mix32, mix64, split_words

_BELOW_ONE = 1.0 - 2.0**-24


def request_streams(keys: Tensor) -> Tensor:
    """Stream of each request's empty prefix: int64 [N, 1] from `keys` int64 [N]."""
    return mix64(mix64(keys) + as_signed(GOLDEN_64))[:, None]


def sample_streams(keys: Tensor, samples: int) -> Tensor:
    """Stream of each of S samples of a request: int64 [N, S]; sample s is the same for every S."""
    return split_streams(request_streams(keys), samples)


def split_streams(streams: Tensor, samples: int) -> Tensor:
    """S streams of each stream: int64 [N, S] from [N, 1]; stream s is the same for every S."""
    return extend_streams(streams, torch.arange(samples, device=streams.device))


def extend_streams(streams: Tensor, tokens: Tensor) -> Tensor:
    """Streams of the prefixes that one more code makes; both int64, broadcast to each other."""
    return mix64(streams + (tokens + 1) * as_signed(GOLDEN_64))


def uniforms(streams: Tensor, counters: Tensor) -> Tensor:
    """Float32 in (0, 1), entry i a hash of (stream i, counter i); both int64, broadcast.

    Resolution is 2^-32 near zero: take small numbers where a tail matters.
    """
    low, high = split_words(streams)
    bits = mix32(low + (counters + 1) * GOLDEN_32, high)
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=_BELOW_ONE)


def gumbels(streams: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise -log(E) with E = -log(1 - U): large values come from small U."""
    return -(-(-uniforms(streams, counters)).log1p()).log()
