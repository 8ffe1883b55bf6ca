"""A key and a count go in, a permutation comes out: chance as a pure function of (seed, name, epoch, index).

Keys are hashed with splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) and
sorted, so that an order is the same on every platform and with every release of numpy.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Indices = npt.NDArray[np.int64]


def key_of(*parts: Any) -> int:
    """64 bits that depend on every part and on their order: key_of(seed, "web", epoch)."""
    text = "\x00".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permutation(count: int, key: int) -> Indices:
    """The numbers 0 .. count-1 in the order that `key` decides."""
    value = np.arange(1, count + 1, dtype=np.uint64) * _STEP + np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")
