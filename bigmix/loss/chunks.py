"""Sizes the chunks of the loss, by a formula over sizes alone, so that runs repeat.

A chunk of C tokens takes 6 C V D operations in three matrix products, and adding its product to the
head's gradient moves 8 V D bytes. On a device of F operations and B bytes a second the adding takes
a fraction (8 / 6) (F / B) / C of the time, a tenth at C = 13 F / B: 256 tokens on a CPU in fp32
(F / B about 20), 512 in bf16 (40), 4096 on a GPU in bf16 (200 to 300). More tokens only cost
memory. Fewer are worth it where the chunk's logits would be large next to what the loss needs in
any case, the gradients of head and hidden states. So the logits get an eighth of that, or an amount
that does not matter where it is more: 8 MiB on a CPU, a 64th of the memory of a GPU, whose matrix
products are slow on few tokens. It is the memory that the device has, not what is free at the
moment, which changes from run to run, and with it the order of additions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_FULL_SPEED_TOKENS_CPU = {4: 256, 2: 512}  # by the bytes of an element
_FULL_SPEED_TOKENS_ELSEWHERE = 4096
_FRACTION_OF_GRADIENTS = 8
_FRACTION_OF_DEVICE = 64
_ALWAYS_FINE_BYTES_CPU = 8 << 20
_MIN_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LossShape:
    """What a chunk's size follows from.

    num_tokens: tokens in the loss, N
    hidden_bytes: of an element of hidden states and head
    logit_bytes: of one logit in the chunk, together with that of a reference where there is one
    device_bytes: memory of the device, 0 for a CPU
    """

    num_tokens: int
    hidden_size: int
    vocabulary_size: int
    hidden_bytes: int
    logit_bytes: int
    device_type: str
    device_bytes: int


def chunk_bytes(shape: LossShape) -> int:
    """Memory that the logits of a chunk may take by the formula above."""
    # In fp32, as the head's gradient is added up; where it is not, that memory is spared and a
    # larger chunk pays.
    gradients = shape.hidden_size * (
        4 * shape.vocabulary_size + shape.hidden_bytes * shape.num_tokens
    )
    always_fine = _ALWAYS_FINE_BYTES_CPU
    if shape.device_type != "cpu":
        always_fine = shape.device_bytes // _FRACTION_OF_DEVICE
    return max(gradients // _FRACTION_OF_GRADIENTS, always_fine)


def chunk_tokens(shape: LossShape, given_bytes: int | None = None) -> int:
    """The most tokens of a chunk: by the formula, or as many as fit `given_bytes`; at least 16."""
    token_bytes = shape.vocabulary_size * shape.logit_bytes
    if given_bytes is not None:
        return max(_MIN_TOKENS, given_bytes // token_bytes)
    full_speed = _FULL_SPEED_TOKENS_ELSEWHERE
    if shape.device_type == "cpu":
        full_speed = _FULL_SPEED_TOKENS_CPU.get(shape.hidden_bytes, 256)
    return max(_MIN_TOKENS, min(full_speed, chunk_bytes(shape) // token_bytes))


def even_slices(num_tokens: int, max_tokens: int) -> list[slice]:
    """The tokens in as few chunks of at most `max_tokens` (16 or more) as possible.

    All chunks but the last have the same number of tokens, a multiple of 16.
    """
    if not num_tokens:
        return []
    max_tokens = max_tokens // _MIN_TOKENS * _MIN_TOKENS
    num_chunks = -(-num_tokens // max_tokens)
    size = -(-num_tokens // (_MIN_TOKENS * num_chunks)) * _MIN_TOKENS
    return list(slices(num_tokens, size))


def slices(count: int, size: int) -> Iterator[slice]:
    """The numbers below `count` in slices of `size`; the last one may be shorter."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)
