"""Randomness as a pure function of keys such as (seed, source name, epoch, index).

Keys are hashed with splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014), so that an order is the same on every platform and with every release of numpy.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bigmix.types import Ints

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 4

T = TypeVar("T")
_Words = npt.NDArray[np.uint64]


def key_of(*parts: Any) -> int:
    """64 bits that depend on every part and on their order: key_of(seed, "web", epoch)."""
    text = "\x00".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def evenly_spaced(items: Sequence[T], most: int | None) -> Sequence[T]:
    """At most `most` of the items (None: all), at equal distances."""
    if most is None or most >= len(items):
        return items
    return [items[index * len(items) // most] for index in range(most)]


def keys_of(key: int, indices: Ints) -> _Words:
    """A key for each index, derived from one key."""
    return _hash((indices.astype(np.uint64) + np.uint64(1)) * _STEP + np.uint64(key))


def permutation(count: int, key: int) -> Ints:
    """The numbers 0 .. count-1 in the order that `key` decides."""
    # The hash maps no two numbers to the same one, so there are no ties for the sort to break.
    return np.argsort(keys_of(key, np.arange(count)))


def shuffled(indices: Ints, counts: Ints, keys: _Words) -> Ints:
    """Where each index of 0 .. count-1 goes in the permutation that its key decides.

    All arguments are [N]: index n is permuted among counts[n] numbers under keys[n]. The rest of
    the permutation is not formed, so that the cost is that of the N indices alone.

    A Feistel network (Luby, Rackoff, 1988) over pairs (left, right) with left < a and right < b,
    where a * b is just above the count; what falls outside is permuted again until it is inside
    (Black, Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    values = _feistel(indices.astype(np.uint64), counts, keys)
    outside = np.flatnonzero(values >= counts.astype(np.uint64))
    while len(outside):
        values[outside] = _feistel(values[outside], counts[outside], keys[outside])
        outside = outside[values[outside] >= counts[outside].astype(np.uint64)]
    return values.astype(np.int64)


def _feistel(values: _Words, counts: Ints, keys: _Words) -> _Words:
    rights = np.ceil(np.sqrt(counts)).astype(np.uint64)
    lefts = (counts.astype(np.uint64) + rights - np.uint64(1)) // rights
    left, right = values // rights, values % rights
    for _ in range(_ROUNDS):
        keys = keys + _STEP
        left = (left + _hash(right * _MIX_1 + keys) % lefts) % lefts
        keys = keys + _STEP
        right = (right + _hash(left * _MIX_1 + keys) % rights) % rights
    return left * rights + right


def _hash(value: _Words) -> _Words:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    mixed: _Words = value ^ (value >> np.uint64(31))
    return mixed
