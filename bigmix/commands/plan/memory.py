"""The sizes of a model and DeepSpeed's keys go in, the bytes of one rank come out, part by part and
phase by phase.

Under ZeRO-3 with N ranks, P weights of b bytes (Rajbhandari et al., "ZeRO", 2020): weights b P / N,
gradients 4 P / N, master weights 4 P / N, Adam's moments 8 P / N. What the paper leaves out is what
DeepSpeed 0.19 allocates beside them: reduce bucket, gathered and prefetched weights, a flat copy of
the gradients in the step. Activations are counted on the model itself (what is kept, and what
checkpointing keeps: Korthikanti et al., 2022).
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
    """How a model is trained: `keys` is the whole DeepSpeed configuration, `tokens` those of a
    micro-batch.

    `holds_base`: the model as it was before training lies beside it, for evaluations.
    """

    keys: Mapping[str, Any]
    ranks: int
    dtype: str
    on_gpu: bool
    tokens: int
    device_bytes: int
    loss_chunk_mib: int | None
    activation_checkpointing: bool
    saves_in_background: bool = False
    keeps_average: bool = False
    holds_base: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of one weight in the model."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """Of one element of the accumulated gradient."""
        given = self.keys.get("data_types", {}).get("grad_accum_dtype")
        return _DTYPE_BYTES.get(given or self.dtype, 4)

    @property
    def state_bytes(self) -> int:
        """What a checkpoint holds of one weight: itself, two moments and its average where one is
        kept, in fp32.
        """
        return 16 if self.keeps_average else 12

    @property
    def bucket_bytes(self) -> int:
        """Of one element of the reduce bucket."""
        return _DTYPE_BYTES.get(self.keys.get("communication_data_type") or self.dtype, 4)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return zero_stage(self.keys)

    def zero(self, key: str, default: int) -> int:
        """A number of zero_optimization."""
        return int(self.keys.get("zero_optimization", {}).get(key, default))

    def offload(self, what: str) -> MemoryPlace:
        """Where the optimizer's states or the weights live."""
        given = self.keys.get("zero_optimization", {}).get(f"offload_{what}") or {}
        places: dict[str, MemoryPlace] = {"cpu": "host", "nvme": "nvme"}
        return places.get(given.get("device", "none"), "device")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One use of memory, in bytes: at the peak of forward, of backward and of the optimizer's
    step.
    """

    name: str
    place: MemoryPlace
    forward: int
    backward: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """All uses of one rank."""

    parts: tuple[Part, ...]

    def total(self, phase: str, place: MemoryPlace = "device") -> int:
        """The bytes of a phase."""
        return sum(getattr(part, phase) for part in self.parts if part.place == place)

    def peak(self, place: MemoryPlace = "device") -> int:
        """The most bytes of any phase."""
        return max(self.total(phase, place) for phase in PHASES)

    @property
    def peak_phase(self) -> str:
        """The phase with the most device memory."""
        return max(PHASES, key=self.total)


def memory_of(shape: Shape, setting: Setting, reference: Shape | None = None) -> Memory:
    """What one rank holds, with a frozen reference beside the model where there is one."""
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


def shard_of(shape: Shape, ranks: int) -> int:
    """Weights of one rank under ZeRO-3: each parameter is padded to a multiple of the ranks."""
    return sum(-(-n // ranks) for n in (*shape.matrices, *shape.vectors))


def _always(name: str, place: MemoryPlace, size: int) -> Part:
    return Part(name=name, place=place, forward=size, backward=size, step=size)


def _states(shape: Shape, setting: Setting) -> Iterator[Part]:
    stage, ranks = setting.stage, setting.ranks
    shard, whole = shard_of(shape, ranks), shape.parameters
    optimizer, weights = setting.offload("optimizer"), setting.offload("param")
    states = shard if stage else whole
    held = setting.weight_bytes * (shard if stage == 3 else whole)
    yield _always("weights", weights, held)
    yield _always("base weights (evaluate_kl)", weights, held * setting.holds_base)
    has_master = stage > 0 or setting.dtype != "fp32"
    yield _always("master weights, fp32", optimizer, 4 * states * has_master)
    yield _always("Adam moments, fp32", optimizer, 8 * states)
    yield _always("average of the weights, fp32", optimizer, 4 * states * setting.keeps_average)
    gradients = setting.gradient_bytes * (shard if stage >= 2 else whole)
    yield _always("gradients", "host" if optimizer == "nvme" else optimizer, gradients)
    hpz = setting.zero("zero_hpz_partition_size", 1)
    if stage == 3 and hpz > 1:
        yield _always(
            "second shard of the weights (hpz)", "device", setting.weight_bytes * whole // hpz
        )
    if optimizer == "host":
        yield _always("gradients for the step, fp32", "host", 4 * states)
    # Made at the first save and kept; each rank writes a part of the states, whatever the stage.
    saved = setting.state_bytes * shard * setting.saves_in_background
    yield _always("copy for checkpoints", "host", saved)


def _reference(reference: Shape | None, setting: Setting) -> Iterator[Part]:
    """A frozen model: its weights, sharded under ZeRO-3 alone; at the loss its head and its hidden
    states beside ours.
    """
    if reference is None:
        return
    width, sharded = setting.weight_bytes, setting.stage == 3
    held = shard_of(reference, setting.ranks) if sharded else reference.parameters
    yield _always("reference weights", setting.offload("param"), width * held)
    head = reference.vocabulary * reference.hidden * (sharded and setting.ranks > 1)
    yield Part(
        name="reference at the loss",
        place="device",
        forward=width * (head + setting.tokens * reference.hidden),
        backward=0,
        step=0,
    )


def _buckets(shape: Shape, setting: Setting) -> Iterator[Part]:
    elements = setting.zero("reduce_bucket_size", _BUCKET)
    if not setting.on_gpu:  # what was never written is not resident
        elements = min(elements, shape.parameters)
    copies = 2 if setting.stage < 3 and _overlaps(setting) else 1
    yield _always("reduce bucket", "device", copies * elements * setting.bucket_bytes)


def _overlaps(setting: Setting) -> bool:
    return bool(setting.keys.get("zero_optimization", {}).get("overlap_comm", False))


def _gathered(shape: Shape, setting: Setting) -> Part:
    """Whole weights under ZeRO-3: what is small stays whole, the rest is gathered for one layer and
    ahead of the next.
    """
    if setting.stage < 3 or setting.ranks == 1:
        return _always("gathered weights", "device", 0)
    threshold = setting.zero("stage3_param_persistence_threshold", _PERSISTENT)
    small = sum(n for n in (*shape.matrices, *shape.vectors) if n <= threshold)
    ahead = setting.zero("stage3_prefetch_bucket_size", _PREFETCH)
    room = min(shape.parameters - small, setting.zero("stage3_max_live_parameters", 10**9))
    most = max(shape.vocabulary * shape.hidden, _layer(shape))
    return Part(
        name="gathered weights",
        place="device",
        forward=setting.weight_bytes * (small + min(room, most + ahead)),
        backward=setting.weight_bytes * (small + min(room, _layer(shape) + ahead)),
        step=setting.weight_bytes * small,
    )


def _layer(shape: Shape) -> int:
    """Weights of a layer."""
    return sum(_inner(shape)) // max(1, shape.layers)


def _inner(shape: Shape) -> list[int]:
    """The sizes of the matrices that are neither embedding nor head."""
    outer = shape.vocabulary * shape.hidden
    return [n for n in shape.matrices if n != outer]


def _activations(shape: Shape, setting: Setting) -> Part:
    kept = shape.activations
    forward = backward = kept.total
    if setting.activation_checkpointing:
        forward = kept.outside + shape.layers * kept.entrance
        backward = forward + kept.layer  # one layer at a time is computed again
    return Part(name="activations", place="device", forward=forward, backward=backward, step=0)


def _loss(shape: Shape, setting: Setting, reference: Shape | None) -> Part:
    """Head and loss: the head's gradient, that of the hidden states, and one chunk of logits.

    The head's gradient is added up in fp32 and narrowed in its own memory; where one chunk takes
    all tokens, it is in the dtype of the weights at once.
    """
    width, head = setting.weight_bytes, shape.vocabulary * shape.hidden
    logit_bytes = 4 if setting.on_gpu else width
    gradient_bytes = (
        4 if setting.on_gpu else width
    )  # a CPU computes bf16 logits twice in place of an fp32 sum
    sizes = LossShape(
        num_tokens=setting.tokens,
        hidden_size=shape.hidden,
        vocabulary_size=shape.vocabulary,
        hidden_bytes=width,
        logit_bytes=logit_bytes * (1 if reference is None else 2),
        device_type="cuda" if setting.on_gpu else "cpu",
        device_bytes=setting.device_bytes,
    )
    given = None if setting.loss_chunk_mib is None else setting.loss_chunk_mib << 20
    tokens = min(chunk_tokens(sizes, given), setting.tokens)
    gradient = head * (width if tokens == setting.tokens else gradient_bytes)
    hidden = width * shape.hidden * (setting.tokens + tokens)
    return Part(
        name="head and loss",
        place="device",
        forward=gradient + hidden + tokens * shape.vocabulary * sizes.logit_bytes,
        backward=gradient * shape.is_tied,  # waits for the embedding's gradient
        step=0,
    )


def _backward_temporaries(shape: Shape, setting: Setting) -> Part:
    """Gradients on their way: of a layer's widest tensors and of one matrix.

    Or, under ZeRO-3, of all weights of a layer beside a bucket that is reduced, where that is more:
    what the layer kept for backward is gone by then. A bucket is copied once to bring the shards in
    order; gloo, the backend of CPUs, reduces in a second copy.
    """
    kept, width = shape.activations, setting.weight_bytes
    flowing = 3 * kept.widest + 2 * kept.entrance + width * max(_inner(shape), default=0)
    if setting.stage == 3:
        bucket = min(setting.zero("reduce_bucket_size", _BUCKET), shape.parameters)
        copies = (1 if setting.on_gpu else 2) * (setting.ranks > 1)
        reduced = width * _layer(shape) + copies * bucket * setting.bucket_bytes
        flowing = max(flowing, reduced - kept.layer)
    return Part(name="gradients on their way", place="device", forward=0, backward=flowing, step=0)


def _step_temporaries(shape: Shape, setting: Setting) -> Iterator[Part]:
    """A flat fp32 copy of the gradients of a sub-group; on a CPU torch's AdamW makes two more
    tensors of its size.
    """
    if setting.offload("optimizer") != "device":
        return
    matrices = sum(-(-n // setting.ranks) for n in shape.matrices)
    group = min(matrices, setting.zero("sub_group_size", _SUB_GROUP))
    cast = 0 if setting.gradient_bytes == 4 else setting.gradient_bytes
    flat = (4 + cast) * group if setting.stage else 0
    adam = 0 if setting.on_gpu else 8 * group
    yield Part(name="optimizer's step", place="device", forward=0, backward=0, step=flat + adam)
