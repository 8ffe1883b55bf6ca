"""The tables of a recipe, each a frozen model of its settings."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from bigmix.recipe.fields import (
    A_NUMBER,
    AtResume,
    BeforeFirstStep,
    Count,
    CountOrZero,
    Name,
    NonNegative,
    PathOrUrl,
    Positive,
    Rows,
    Settings,
)
from bigmix.recipe.shares import GroupShare, Share, SourceShare, fault_of_points, kind_of
from bigmix.types import Weighing

_Beta = Annotated[float, Field(ge=0, lt=1), A_NUMBER]
_Lengths = Annotated[tuple[tuple[CountOrZero, Count], ...], Field(min_length=1), Tag("<points>")]
Length = Annotated[Annotated[Count, Tag("<number>")] | _Lengths, Discriminator(kind_of)]


class ModelSettings(Settings):
    """The model that is trained."""

    path: PathOrUrl | None = None
    """Folder or hub name of a causal language model in the Hugging Face format."""
    config: dict[str, Any] | None = None
    """Instead of `path`: a Hugging Face configuration (with `model_type`) to start from scratch,
    weights drawn from `seed`.
    """
    tokenizer: PathOrUrl | None = None
    """Tokenizer of the model; default: the one in `path`, or the sources' own where the model
    starts from scratch.
    """
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; the optimizer always keeps fp32. auto: bf16 on a GPU,
    fp32 on a CPU.
    """
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention backend. auto: flash_attention_2 where it is installed and can run, else sdpa."""
    activation_checkpointing: Annotated[bool, AtResume.FREE] = False
    """Recompute each layer in backward instead of keeping its activations: less memory, about a
    third more time.
    """

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSettings":
        if (self.path is None) == (self.config is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(f"{given} of path and config given; give exactly one of them")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config has no model_type; add one, such as model_type: llama")
        return self


class Group(Settings):
    """Sources that divide one share among themselves, in the ratio of their own shares."""

    share: GroupShare
    """Fraction of the rows for all members together: of the run, or of the group that this one is
    in; a number, points or a controller.
    """
    loss_share: Annotated[Share | None, Rows.STAY] = None
    """Fraction of the gradient; default: the share."""
    group: Name | None = None
    """The group that this one is in."""

    @model_validator(mode="after")
    def _shares(self) -> "Group":
        return _checked_points(self)


class Cache(Settings):
    """Where shards that lie elsewhere are kept while they are needed; all processes of a machine
    share it.
    """

    folder: str = "~/.cache/bigmix/shards"
    """Folder on a local disk."""
    size: Count = 64_000_000_000
    """Bytes that the cache may hold at most."""
    read: Literal["auto", "whole", "ranges"] = "auto"
    """whole: a shard is fetched before its first row is read; ranges: only the blocks that rows of
    this machine are in. auto: ranges for text on 64 machines and more.
    """
    ahead_files: Count = 8
    """Shards that each rank fetches ahead of need at most."""
    ahead_bytes: Count = 4_000_000_000
    """Bytes of them at most."""
    tries: Count = 8
    """Tries in a row without one new byte after which a file is given up."""
    timeout_s: Positive = 30.0
    """Seconds without a byte after which a transfer is begun again from where it is."""


class Source(Settings):
    """One named stream of documents."""

    # Its content must stay, which is checked on its own.
    path: Annotated[PathOrUrl, AtResume.FREE, Rows.STAY]
    """Prepared source, as `bigmix prepare` makes it: a folder, a URL of one (s3, gs, https, hf, any
    of fsspec), a brace pattern of its shards, or `pipe:` with a command in which {} is the file.
    """
    role: Annotated[Literal["task", "replay"], Rows.STAY]
    """task: what the model shall learn; replay: pretraining data that keeps what it knows."""
    share: SourceShare
    """Fraction of the rows; a number, points [step, share] with straight lines between them,
    {temperature: 0.5}, {unimax: 4}, or a controller. Shares are normalised to sum to 1 in each
    group.
    """
    loss_share: Annotated[Share | None, Rows.STAY] = None
    """Fraction of the gradient; default: the share."""
    group: Name | None = None
    """The group whose share this source divides with the other members; default: none, the share is
    one of the run.
    """
    weigh: Annotated[Weighing, Rows.STAY] = "token"
    """What counts alike in the source's loss: each token, each document whatever its length, or
    square_root: between them.
    """
    max_epochs: Positive | None = None
    """How many times the source may be gone through; default: without limit."""
    when_exhausted: Literal["error", "stop", "renormalise"] = "error"
    """What happens where the run would need more than max_epochs. error: it is refused; stop: it
    ends there; renormalise: it goes on without the source.
    """
    held_out: Annotated[PathOrUrl | None, Rows.STAY] = None
    """Prepared folder that is evaluated and never trained on."""
    long_documents: Literal["drop", "truncate"] = "drop"
    """What happens to a conversation longer than a row; text is always split, with nothing lost."""
    whole_below: CountOrZero = 0
    """Texts with fewer tokens than this are never split over two rows; 0: rows are cut anywhere and
    hold no padding.
    """

    @model_validator(mode="after")
    def _shares(self) -> "Source":
        return _checked_points(self)


_Sharing = TypeVar("_Sharing", "Source", Group)


def _checked_points(settings: _Sharing) -> _Sharing:
    for name, value in (("share", settings.share), ("loss_share", settings.loss_share)):
        fault = fault_of_points(value) if isinstance(value, tuple) else None
        if fault is not None:
            raise ValueError(f"{name} {fault}")
    return settings


class Budget(Settings):
    """How long the run is; exactly one of the three."""

    task_tokens: Count | None = None
    """Tokens of the task sources; replay comes on top. Runs that will be compared fix this."""
    total_tokens: Count | None = None
    """Tokens of all sources; replay takes the place of task tokens."""
    steps: Count | None = None
    """Optimizer steps."""


class Train(Settings):
    """What moves the weights."""

    lr: Annotated[Positive, BeforeFirstStep.IGNORED]
    """Highest learning rate of AdamW."""
    schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], BeforeFirstStep.IGNORED] = (
        "cosine"
    )
    """Learning rate after the warm-up; wsd: constant, then a linear decay over the last `decay` of
    the steps.
    """
    warmup: Annotated[NonNegative, BeforeFirstStep.IGNORED] = 0.03
    """Linear warm-up: below 1 a fraction of the steps, else a number of steps."""
    decay: Annotated[Annotated[float, Field(gt=0, le=1), A_NUMBER], BeforeFirstStep.IGNORED] = 0.2
    """Fraction of the steps that the decay of wsd takes."""
    final_lr: Annotated[Annotated[float, Field(ge=0, le=1), A_NUMBER], BeforeFirstStep.IGNORED] = (
        0.0
    )
    """Learning rate that the schedule ends at, one step after the last, as a fraction of lr."""
    weight_decay: Annotated[NonNegative, BeforeFirstStep.IGNORED] = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: Annotated[tuple[_Beta, _Beta], BeforeFirstStep.IGNORED] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Annotated[Positive, BeforeFirstStep.IGNORED] = 1e-8
    """AdamW's epsilon."""
    ema: Annotated[
        Annotated[float, Field(gt=0, lt=1), A_NUMBER] | None, BeforeFirstStep.IGNORED
    ] = None
    """Decay per step of an exponential moving average of the weights, such as 0.999: evaluations
    and the export are then of the average, the training is not changed; 4 bytes a parameter over
    all ranks. Default: none is kept.
    """
    clip: Annotated[NonNegative, BeforeFirstStep.IGNORED] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    micro_batch_rows: Annotated[Count, AtResume.FREE] = 1
    """Rows of one forward pass on one rank; accumulation follows from it.

    It changes speed and memory, never the result.
    """
    steps: Annotated[Count | None, BeforeFirstStep.IGNORED] = None
    """Optimizer steps, in place of what the budget gives."""
    pass_over: Annotated[tuple[Count, ...], BeforeFirstStep.IGNORED] = ()
    """Steps whose rows are not trained: the weights stay as they are."""
    log_every: Annotated[Count, AtResume.FREE, BeforeFirstStep.IGNORED] = 10
    """Steps between two readings of the device; metrics.jsonl has a line for every step all the
    same.
    """
    prefetch_steps: Annotated[Count, AtResume.FREE, BeforeFirstStep.IGNORED] = 2
    """Steps whose rows are made ready ahead of need."""


class Evaluate(Settings):
    """When the model is evaluated, and what is measured."""

    every: Annotated[
        CountOrZero, AtResume.FREE_WITHOUT_CONTROLLERS, Rows.MOVE, BeforeFirstStep.IGNORED
    ] = 0
    """Steps between held-out evaluations; 0: only before the first and after the last step."""
    rows: Annotated[Count | None, AtResume.FREE_WITHOUT_CONTROLLERS] = None
    """Rows of each held-out source that an evaluation reads at most, spread evenly; default: all of
    them.
    """
    kl: Annotated[bool, AtResume.FREE] = False
    """Measure KL(base || model) in held-out evaluations, to `model.path` as it is before training:
    it is held in memory next to the model.
    """
    task_weights: Annotated[Literal["auto", "whole", "sharded"], AtResume.FREE] = "auto"
    """How the weights of a ZeRO-3 model are held while it answers tasks and the prompts of the
    behaviour probe. whole: gathered once into a copy on each rank; sharded: gathered for each
    token, slow; auto: whole where the copy fits twice into the memory that is free.
    """


def behaviour_table(value: Any) -> Any:
    """A table of `Behaviour` from the one word that may stand in its place; YAML reads `off` as
    false.
    """
    word = {False: "off", True: "every"}.get(value, value) if isinstance(value, bool) else value
    return {"when": word} if isinstance(word, str) else value


class Behaviour(Settings):
    """The behaviour probe: what the model answers to general prompts, against the answers that it
    gave before the first step; docs/behaviour.md. One word in place of the table is its `when`.
    """

    when: Literal["auto", "every", "ends", "off"] = "auto"
    """The evaluations it is part of. every: all; ends: before the first and after the last step;
    off: none; auto: every where `model.path` is a chat model, off elsewhere.
    """
    prompts: PathOrUrl | None = None
    """File of prompts (.jsonl): messages, and constraints on the answers; default: the prompts that
    come with bigmix, in English and Chinese.
    """
    languages: Annotated[tuple[Literal["en", "zh"], ...], Field(min_length=1)] = ("en", "zh")
    """Languages of the prompts that come with bigmix."""
    num_prompts: Count | None = None
    """Most prompts, spread evenly over all kinds; default: all."""
    max_new_tokens: Count = 96
    """Tokens after which an answer ends in any case."""
    batch_rows: Count = 32
    """Answers that one rank writes at a time; it changes speed and memory only."""
    samples: CountOrZero = 3
    """Answers that are shown next to those of the base after each evaluation."""


class Checkpoint(Settings):
    """When the run is saved, stopped and exported."""

    every: CountOrZero = 0
    """Steps between checkpoints; 0: only after the last step."""
    background: bool = True
    """Whether steps go on while a checkpoint is written, from a copy in host memory, 12 bytes a
    parameter over all ranks (16 with ema); false: they wait for the disk.
    """
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Checkpoints of every step that is a multiple of this are kept as well; 0: of none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint of `output` if there is one; never: refuse
    an output that holds a run.
    """
    max_minutes: Positive | None = None
    """Minutes after which the run saves a checkpoint and ends with 75, as after a signal; the same
    command continues it. Default: no limit.
    """
    stop_before_end_minutes: NonNegative = 5.0
    """Minutes before the end of its Slurm job, where SLURM_JOB_END_TIME tells it, at which the run
    saves and ends with 75.
    """
    export: bool = True
    """Write a Hugging Face folder to `output`/export after the last step."""
    export_shard_gib: Positive = 4.0
    """Largest file of weights in it, in GiB; so much of the model is in the memory of the first
    rank while it is written.
    """


class HealthSettings(Settings):
    """What counts as a fault of a run, and what is done about it."""

    hang_minutes: Annotated[Positive, AtResume.FREE] = 10.0
    """Minutes without progress on any rank, of whatever kind, after which all end with their stacks
    in `output`/log; raise it where one file takes longer to arrive.
    """
    dead_after_s: Annotated[Positive, AtResume.FREE] = 60.0
    """Seconds without a sign of life after which a rank counts as dead; one that dies on a machine
    with others is noticed at once.
    """
    roll_back_after: Count | None = 3
    """Steps in a row without a finite gradient after which the run goes back to the last checkpoint
    and skips them; each such step is skipped on all ranks in any case. null: never.
    """
    most_roll_backs: Annotated[CountOrZero, AtResume.FREE] = 3
    """Times that a run may go back before it ends as failed."""
    spike_deviations: Positive | None = None
    """A loss this many standard deviations above the mean of the last 100 steps is reported as a
    spike; 6 is a start. Default: none is.
    """
    spikes_roll_back: bool = False
    """Whether a spike, too, makes the run go back to the last checkpoint and skip its step."""

    @model_validator(mode="after")
    def _spikes(self) -> "HealthSettings":
        if self.spikes_roll_back and self.spike_deviations is None:
            raise ValueError(
                "spikes_roll_back is true and spike_deviations is not given, so that no loss is a"
                " spike; set spike_deviations=6"
            )
        return self


class Loss(Settings):
    """Terms of the objective besides the loss of the tokens, and how the loss is computed."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1), A_NUMBER] = 0.0
    """Part of each label's probability that is spread over the whole vocabulary."""
    z_loss: NonNegative = 0.0
    """Coefficient of the square of each token's log-normaliser, which keeps logits from growing;
    1e-4 is usual.
    """
    entropy: Annotated[bool, AtResume.FREE] = False
    """Log the mean entropy of the predictions of each source, for a little time."""
    backend: Annotated[Literal["auto", "triton", "torch"], AtResume.FREE] = "auto"
    """What computes the rows of the logits. auto: triton on a GPU where it is installed, else
    torch.
    """
    head_gradient: Annotated[Literal["auto", "accumulate", "recompute"], AtResume.FREE] = "auto"
    """How the head's gradient is made of several chunks. accumulate: their products are added up in
    fp32; recompute: logits are made twice, with no fp32 copy: a third more time in the head, 2
    bytes less for each of its weights. auto: accumulate, but recompute in bf16 on a CPU.
    """
    chunk_mib: Annotated[Count | None, AtResume.FREE] = None
    """Memory for the logits of one chunk, in MiB; default: by sizes and device, see docs/loss.md.
    """


class Reference(Settings):
    """A frozen model that chosen sources stay close to, by the divergence KL(reference || model) of
    their loss tokens.
    """

    model: PathOrUrl | None = None
    """Folder or hub name of a model with the same tokenizer; default: `model.path`, the model as it
    was before training.
    """
    sources: Annotated[dict[Name, Positive], Field(min_length=1)]
    """Weight of the mean divergence over the loss tokens of a source, for each source that has one;
    0.1 is a start.
    """


class HeldOut(Settings):
    """A prepared folder that is evaluated and never trained on, with what decides its rows."""

    path: PathOrUrl
    """Prepared folder."""
    long_documents: Literal["drop", "truncate"] = "drop"
    """What happens to a conversation longer than a row; text is always split, with nothing lost."""
    whole_below: CountOrZero = 0
    """Texts with fewer tokens than this are never split over two rows."""


def _kind_of_held_out(value: Any) -> str:
    return "<table>" if isinstance(value, dict | HeldOut) else "<text>"


FurtherHeldOut = Annotated[
    Annotated[PathOrUrl, Tag("<text>")] | Annotated[HeldOut, Tag("<table>")],
    Discriminator(_kind_of_held_out),
]
Chosen = Annotated[
    tuple[int | str, ...], BeforeValidator(lambda v: [v] if isinstance(v, int | str) else v)
]


class Sweep(Settings):
    """Runs that differ in a few settings.

    Every further key is a dotted setting with the list of its values, such as `train.lr: [1e-5,
    3e-5]`; of several, each combination is a point.
    """

    model_config = ConfigDict(extra="allow")

    seeds: Count = 1
    """Runs of each point: with the recipe's seed, the next one, and so on."""
    points: dict[Name, dict[str, Any]] = Field(default={})
    """Further points, by name: the settings in which each differs from the recipe."""
    only: Chosen = ()
    """Runs to take alone: by number or name as `bigmix sweep` lists them, or all of a point by its
    name.
    """
    part: Annotated[str, Field(pattern=r"^[1-9][0-9]*/[1-9][0-9]*$")] | None = None
    """I/N: of those, every N-th beginning with the I-th, so that N jobs divide them among
    themselves.
    """
