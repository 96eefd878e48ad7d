"""Uniform integers that are a pure function of keys, such as negatives of a token.

Like keyed dropout, the draw depends neither on world size nor on batching: entry (t, r) is a hash
of (keys[t], salt, r), on every device.

Shape legend: T keys (tokens, sequences or steps), R draws of a key.
"""

import torch
from torch import Tensor

from models.ops import native
from models.ops.hashing import GOLDEN_32, GOLDEN_64, as_signed, mix32, mix64, split_words


def keyed_integers(keys: Tensor, count: int, high: int, salt: int) -> Tensor:
    """``count`` uniform draws from 0 .. ``high`` - 1 for each key, with replacement: int64 [T, R].

    ``keys`` int64 [T] (see ``token_keys``). ``high`` must lie in 1 .. 2^31 - 1; the bias against
    an exactly uniform draw is below ``high`` / 2^32.
    """
    if not 1 <= high < 2**31:
        raise ValueError(f"can draw from 1 to 2^31 - 1 rows, not {high}")
    if keys.device.type != "cpu" or not native.native_available():
        return keyed_integers_reference(keys, count, high, salt)
    out = torch.empty(keys.shape[0], count, dtype=torch.int64)
    salted = mix64(keys + as_signed(salt * GOLDEN_64))
    sizes = (keys.shape[0], count, high, torch.get_num_threads())
    native.call("tandem_keyed_integers", salted, *sizes, out)
    return out


def keyed_integers_reference(keys: Tensor, count: int, high: int, salt: int) -> Tensor:
    """``keyed_integers`` in plain PyTorch."""
    low, upper = split_words(mix64(keys + as_signed(salt * GOLDEN_64)))
    draws = torch.arange(count, device=keys.device) * GOLDEN_32
    return (mix32(low[:, None] + draws, upper[:, None]) * high) >> 32
