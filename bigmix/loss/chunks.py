"""Sizes go in, how many tokens a chunk of the loss has comes out; never anything measured, so that
runs repeat.

A chunk of C tokens takes 6 C V D operations in three matrix products, and adding its product to the
head's gradient moves 8 V D bytes. On a device of F operations and B bytes a second the adding takes
a fraction (8 / 6) (F / B) / C of the time, a tenth at C = 13 F / B: 256 tokens on a CPU in fp32 (F
/ B about 20), 512 in bf16 (40), 4096 on a GPU in bf16 (200 to 300). More tokens only cost memory.
Fewer are worth it where the chunk's logits would be large beside what the loss needs in any case,
the gradients of head and hidden states: the logits get an eighth of that, or what nobody misses
where that is more: 8 MiB on a CPU, a 64th of the memory of a GPU, whose matrix products are slow on
few rows. It is the memory that the device has, not what is free: that changes from run to run, and
with it the order of additions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_FULL_SPEED_CPU = {4: 256, 2: 512}  # by the bytes of an element
_FULL_SPEED_ELSEWHERE = 4096
_OF_GRADIENTS = 8
_OF_DEVICE = 64
_LEAST_BYTES_CPU = 8 << 20
_FEWEST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LossShape:
    """What a chunk's size follows from: N tokens in the loss, hidden size D, vocabulary V, bytes of
    their elements.

    `logit_bytes`: of one logit in the chunk, those of a reference's beside it included.
    """

    tokens: int
    hidden: int
    vocabulary: int
    hidden_bytes: int
    logit_bytes: int
    device_type: str
    device_bytes: int


def chunk_bytes(shape: LossShape) -> int:
    """Memory that the logits of a chunk may take by the formula above."""
    # In fp32, as the head's gradient is added up; where it is not, that memory is spared and a
    # larger chunk pays.
    gradients = shape.hidden * (4 * shape.vocabulary + shape.hidden_bytes * shape.tokens)
    of_gradients = gradients // _OF_GRADIENTS
    on_cpu = shape.device_type == "cpu"
    return max(of_gradients, _LEAST_BYTES_CPU if on_cpu else shape.device_bytes // _OF_DEVICE)


def chunk_tokens(shape: LossShape, given_bytes: int | None = None) -> int:
    """Tokens of a chunk at most: by the formula, or as many as fit `given_bytes`."""
    token_bytes = shape.vocabulary * shape.logit_bytes
    if given_bytes is not None:
        return max(_FEWEST, given_bytes // token_bytes)
    full_speed = _FULL_SPEED_ELSEWHERE
    if shape.device_type == "cpu":
        full_speed = _FULL_SPEED_CPU.get(shape.hidden_bytes, 256)
    return max(_FEWEST, min(full_speed, chunk_bytes(shape) // token_bytes))


def even_slices(tokens: int, most: int) -> list[slice]:
    """The tokens in as few chunks of at most `most` (from 16 on) as there must be, multiples of 16
    but for the last.
    """
    if not tokens:
        return []
    most = most // _FEWEST * _FEWEST
    chunks = -(-tokens // most)
    size = -(-tokens // (_FEWEST * chunks)) * _FEWEST
    return list(slices(tokens, size))


def slices(count: int, size: int) -> Iterator[slice]:
    """Numbers below `count` in slices of `size`, the last one as long as there are some."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU; 0 elsewhere."""
    return (
        int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
    )
