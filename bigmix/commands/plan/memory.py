"""Predicts the memory of one rank, for each use and each phase of a step.

Under ZeRO-3 with N ranks and P weights of b bytes (Rajbhandari et al., "ZeRO", 2020): weights
b P / N, gradients 4 P / N, master weights 4 P / N, Adam's moments 8 P / N. Besides these, which the
paper counts, DeepSpeed 0.19 allocates a reduce bucket, gathered and prefetched weights, and a flat
copy of the gradients in the step. Activations are counted on the model itself (what is kept, and
what checkpointing keeps: Korthikanti et al., 2022).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bigmix.commands.plan.shape import Shape
from bigmix.loss.chunks import LossShape, chunk_tokens
from bigmix.model.ds_config import zero_stage

MemoryPlace = Literal["device", "host", "nvme"]
PLACES: tuple[MemoryPlace, ...] = ("device", "host", "nvme")
PHASES = ("forward", "backward", "step")
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's own defaults, for files that leave the keys out.
_BUCKET, _PREFETCH, _PERSISTENT, _SUB_GROUP = 500_000_000, 50_000_000, 100_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a model is trained.

    `keys` is the complete DeepSpeed configuration, `num_tokens` the number of tokens in a
    micro-batch. With `holds_base` the model as it was before training is also in memory, for
    evaluations.
    """

    keys: Mapping[str, Any]
    num_ranks: int
    dtype: str
    on_gpu: bool
    num_tokens: int
    device_bytes: int
    loss_chunk_mib: int | None
    activation_checkpointing: bool
    saves_in_background: bool = False
    keeps_average: bool = False
    holds_base: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight in the model."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one element of the accumulated gradient."""
        given = self.keys.get("data_types", {}).get("grad_accum_dtype")
        return _DTYPE_BYTES.get(given or self.dtype, 4)

    @property
    def state_bytes(self) -> int:
        """Bytes in a checkpoint for one weight: the weight, two moments and, where it is kept, the
        average, in fp32.
        """
        return 16 if self.keeps_average else 12

    @property
    def bucket_bytes(self) -> int:
        """Bytes of one element of the reduce bucket."""
        return _DTYPE_BYTES.get(self.keys.get("communication_data_type") or self.dtype, 4)

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return zero_stage(self.keys)

    def zero(self, key: str, default: int) -> int:
        """A number in `zero_optimization`."""
        return int(self.keys.get("zero_optimization", {}).get(key, default))

    def offload(self, what: str) -> MemoryPlace:
        """Where the states of the optimizer or the weights ("optimizer", "param") are kept."""
        given = self.keys.get("zero_optimization", {}).get(f"offload_{what}") or {}
        places: dict[str, MemoryPlace] = {"cpu": "host", "nvme": "nvme"}
        return places.get(given.get("device", "none"), "device")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One use of memory: bytes at the peak of forward, of backward and of the optimizer's step."""

    name: str
    place: MemoryPlace
    forward: int
    backward: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """All uses of memory of one rank."""

    parts: tuple[MemoryPart, ...]

    def total(self, phase: str, place: MemoryPlace = "device") -> int:
        """The bytes of all parts in a phase."""
        return sum(getattr(part, phase) for part in self.parts if part.place == place)

    def peak(self, place: MemoryPlace = "device") -> int:
        """The most bytes of any phase."""
        return max(self.total(phase, place) for phase in PHASES)

    @property
    def peak_phase(self) -> str:
        """The phase with the most device memory."""
        return max(PHASES, key=self.total)


def memory_of(shape: Shape, setting: Setting, reference: Shape | None = None) -> Memory:
    """What one rank holds, with the frozen reference where there is one."""
    parts = [
        *_states(shape, setting),
        *_reference(reference, setting),
        *_buckets(shape, setting),
        _gathered(shape, setting),
        _activations(shape, setting),
        _loss(shape, setting, reference),
        _backward_temporaries(shape, setting),
        *_step_temporaries(shape, setting),
    ]
    return Memory(parts=tuple(p for p in parts if p.forward or p.backward or p.step))


def shard_of(shape: Shape, num_ranks: int) -> int:
    """Weights of one rank under ZeRO-3: each parameter is padded to a multiple of the ranks."""
    return sum(-(-n // num_ranks) for n in (*shape.matrices, *shape.vectors))


def _always(name: str, place: MemoryPlace, size: int) -> MemoryPart:
    return MemoryPart(name=name, place=place, forward=size, backward=size, step=size)


def _states(shape: Shape, setting: Setting) -> Iterator[MemoryPart]:
    """Weights, gradients and the states of the optimizer."""
    stage = setting.stage
    shard, full = shard_of(shape, setting.num_ranks), shape.num_parameters
    optimizer, weights = setting.offload("optimizer"), setting.offload("param")
    states = shard if stage else full
    held = setting.weight_bytes * (shard if stage == 3 else full)
    yield _always("weights", weights, held)
    yield _always("base weights (evaluate.kl)", weights, held * setting.holds_base)
    has_master = stage > 0 or setting.dtype != "fp32"
    yield _always("master weights, fp32", optimizer, 4 * states * has_master)
    yield _always("Adam moments, fp32", optimizer, 8 * states)
    yield _always("average of the weights, fp32", optimizer, 4 * states * setting.keeps_average)
    gradients = setting.gradient_bytes * (shard if stage >= 2 else full)
    yield _always("gradients", "host" if optimizer == "nvme" else optimizer, gradients)
    hpz = setting.zero("zero_hpz_partition_size", 1)
    if stage == 3 and hpz > 1:
        yield _always(
            "second shard of the weights (hpz)", "device", setting.weight_bytes * full // hpz
        )
    if optimizer == "host":
        yield _always("gradients for the step, fp32", "host", 4 * states)
    # Allocated at the first save and kept; at any stage each rank writes a part of the states.
    saved = setting.state_bytes * shard * setting.saves_in_background
    yield _always("copy for checkpoints", "host", saved)


def _reference(reference: Shape | None, setting: Setting) -> Iterator[MemoryPart]:
    """A frozen model: its weights, which only ZeRO-3 shards; at the loss also its head and its
    hidden states.
    """
    if reference is None:
        return
    width, sharded = setting.weight_bytes, setting.stage == 3
    held = shard_of(reference, setting.num_ranks) if sharded else reference.num_parameters
    yield _always("reference weights", setting.offload("param"), width * held)
    head = reference.vocab_size * reference.hidden_size * (sharded and setting.num_ranks > 1)
    yield MemoryPart(
        name="reference at the loss",
        place="device",
        forward=width * (head + setting.num_tokens * reference.hidden_size),
        backward=0,
        step=0,
    )


def _buckets(shape: Shape, setting: Setting) -> Iterator[MemoryPart]:
    num_elements = setting.zero("reduce_bucket_size", _BUCKET)
    if not setting.on_gpu:  # memory that was never written is not resident
        num_elements = min(num_elements, shape.num_parameters)
    num_copies = 2 if setting.stage < 3 and _overlaps(setting) else 1
    yield _always("reduce bucket", "device", num_copies * num_elements * setting.bucket_bytes)


def _overlaps(setting: Setting) -> bool:
    return bool(setting.keys.get("zero_optimization", {}).get("overlap_comm", False))


def _gathered(shape: Shape, setting: Setting) -> MemoryPart:
    """Gathered weights under ZeRO-3: small parameters are never sharded, the others are gathered
    for one layer and ahead of the next.
    """
    if setting.stage < 3 or setting.num_ranks == 1:
        return _always("gathered weights", "device", 0)
    threshold = setting.zero("stage3_param_persistence_threshold", _PERSISTENT)
    small = sum(n for n in (*shape.matrices, *shape.vectors) if n <= threshold)
    ahead = setting.zero("stage3_prefetch_bucket_size", _PREFETCH)
    limit = min(shape.num_parameters - small, setting.zero("stage3_max_live_parameters", 10**9))
    most = max(shape.vocab_size * shape.hidden_size, _layer(shape))
    return MemoryPart(
        name="gathered weights",
        place="device",
        forward=setting.weight_bytes * (small + min(limit, most + ahead)),
        backward=setting.weight_bytes * (small + min(limit, _layer(shape) + ahead)),
        step=setting.weight_bytes * small,
    )


def _layer(shape: Shape) -> int:
    """The number of weights in the matrices of a layer."""
    return sum(_inner(shape)) // max(1, shape.num_layers)


def _inner(shape: Shape) -> list[int]:
    """The sizes of the matrices that are neither embedding nor head."""
    outer = shape.vocab_size * shape.hidden_size
    return [n for n in shape.matrices if n != outer]


def _activations(shape: Shape, setting: Setting) -> MemoryPart:
    kept = shape.activations
    forward = backward = kept.total
    if setting.activation_checkpointing:
        forward = kept.outside + shape.num_layers * kept.entrance
        backward = forward + kept.layer  # one layer at a time is computed again
    return MemoryPart(
        name="activations", place="device", forward=forward, backward=backward, step=0
    )


def _loss(shape: Shape, setting: Setting, reference: Shape | None) -> MemoryPart:
    """Head and loss: the gradients of the head and of the hidden states, and one chunk of logits.

    The head's gradient is added up in fp32 and then narrowed in the same memory; where one chunk
    holds all tokens, it has the dtype of the weights from the start.
    """
    width, head = setting.weight_bytes, shape.vocab_size * shape.hidden_size
    # A CPU computes bf16 logits twice instead of adding the gradient up in fp32.
    element_bytes = 4 if setting.on_gpu else width
    sizes = LossShape(
        num_tokens=setting.num_tokens,
        hidden_size=shape.hidden_size,
        vocabulary_size=shape.vocab_size,
        hidden_bytes=width,
        logit_bytes=element_bytes * (1 if reference is None else 2),
        device_type="cuda" if setting.on_gpu else "cpu",
        device_bytes=setting.device_bytes,
    )
    given = None if setting.loss_chunk_mib is None else setting.loss_chunk_mib << 20
    num_in_chunk = min(chunk_tokens(sizes, given), setting.num_tokens)
    gradient = head * (width if num_in_chunk == setting.num_tokens else element_bytes)
    hidden = width * shape.hidden_size * (setting.num_tokens + num_in_chunk)
    return MemoryPart(
        name="head and loss",
        place="device",
        forward=gradient + hidden + num_in_chunk * shape.vocab_size * sizes.logit_bytes,
        backward=gradient * shape.is_tied,  # kept until the embedding's gradient is added
        step=0,
    )


def _backward_temporaries(shape: Shape, setting: Setting) -> MemoryPart:
    """Gradients on their way: of a layer's widest tensors and of one matrix.

    Or, under ZeRO-3, of all weights of a layer and of a bucket that is being reduced, where that is
    more: what the layer kept for backward is freed by then. A bucket is copied once to bring the
    shards into order; gloo, the backend for CPUs, reduces in a second copy.
    """
    kept, width = shape.activations, setting.weight_bytes
    flowing = 3 * kept.widest + 2 * kept.entrance + width * max(_inner(shape), default=0)
    if setting.stage == 3:
        bucket = min(setting.zero("reduce_bucket_size", _BUCKET), shape.num_parameters)
        num_copies = (1 if setting.on_gpu else 2) * (setting.num_ranks > 1)
        reduced = width * _layer(shape) + num_copies * bucket * setting.bucket_bytes
        flowing = max(flowing, reduced - kept.layer)
    return MemoryPart(
        name="gradients on their way", place="device", forward=0, backward=flowing, step=0
    )


def _step_temporaries(shape: Shape, setting: Setting) -> Iterator[MemoryPart]:
    """A flat fp32 copy of the gradients of a sub-group; on a CPU torch's AdamW makes two more
    tensors of its size.
    """
    if setting.offload("optimizer") != "device":
        return
    matrices = sum(-(-n // setting.num_ranks) for n in shape.matrices)
    group = min(matrices, setting.zero("sub_group_size", _SUB_GROUP))
    cast = 0 if setting.gradient_bytes == 4 else setting.gradient_bytes
    flat = (4 + cast) * group if setting.stage else 0
    adam = 0 if setting.on_gpu else 8 * group
    yield MemoryPart(
        name="optimizer's step", place="device", forward=0, backward=0, step=flat + adam
    )
