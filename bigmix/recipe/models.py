"""The settings of a run as one tree of frozen models; what follows from settings is a property, never written back."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

_MULTIPLES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_HUMAN_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([kmgbt]?)", re.I)


def whole_number(value: Any) -> Any:
    """A count as people write it: 200M, 512K, 2e6 or 1_000 become whole numbers; other values pass unchanged."""
    if isinstance(value, str) and (match := _HUMAN_NUMBER.fullmatch(value.strip())):
        value = float(match[1].replace("_", "")) * _MULTIPLES[match[2].lower()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[PositiveInt, BeforeValidator(whole_number)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(whole_number)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Point = tuple[CountOrZero, NonNegativeFloat]
Share = PositiveFloat | Annotated[tuple[Point, ...], Field(min_length=1)]


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Settings):
    """The model that is trained."""

    path: str | None = None
    """Folder or hub name of a causal language model in the Hugging Face format."""
    config: dict[str, Any] | None = None
    """Instead of `path`: a Hugging Face configuration (with `model_type`) to start from scratch, weights drawn from `seed`."""
    tokenizer: str | None = None
    """Tokenizer of the model; default: the one in `path`, or the sources' own where the model starts from scratch."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; the optimizer always keeps fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention backend. auto: flash_attention_2 where it is installed and can run, else sdpa."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations: less memory, about a third more time."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSettings":
        if (self.path is None) == (self.config is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(f"{given} of path and config given; give exactly one of them")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config has no model_type; add one, such as model_type: llama")
        return self


class Source(Settings):
    """One named stream of documents."""

    path: str
    """Prepared folder, as `bigmix prepare` makes it."""
    role: Literal["task", "replay"]
    """task: what the model is to learn; replay: pretraining data that keeps what it knows."""
    share: Share
    """Fraction of the rows; a number, or points [step, share] with straight lines between them. Shares are normalised to sum to 1."""
    loss_share: Share | None = None
    """Fraction of the gradient; default: the share."""
    held_out: str | None = None
    """Prepared folder that is evaluated and never trained on."""
    long_documents: Literal["drop", "truncate"] = "drop"
    """What happens to a conversation longer than a row; text is always split, with nothing lost."""

    @model_validator(mode="after")
    def _shares(self) -> "Source":
        for name, value in (("share", self.share), ("loss_share", self.loss_share)):
            fault = _fault_of_points(value) if isinstance(value, tuple) else None
            if fault is not None:
                raise ValueError(f"{name} {fault}")
        return self


def _fault_of_points(points: tuple[tuple[int, float], ...]) -> str | None:
    steps = [step for step, _ in points]
    if steps[0] != 0:
        return f"begins at step {steps[0]}; the first point must be at step 0"
    if any(later <= earlier for earlier, later in pairwise(steps)):
        return f"has steps {steps}; they must grow from point to point"
    if all(share == 0 for _, share in points):
        return "is 0 at every point; to leave the source out, delete it"
    return None


class Budget(Settings):
    """How long the run is; exactly one of the three."""

    task_tokens: Count | None = None
    """Tokens of the task sources; replay comes on top. Runs that are to be compared fix this."""
    total_tokens: Count | None = None
    """Tokens of all sources; replay takes the place of task tokens."""
    steps: Count | None = None
    """Optimizer steps."""


class Train(Settings):
    """How the weights are moved, and how often the run looks up."""

    lr: PositiveFloat
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up; wsd: constant, then a linear decay over the last `decay` of the steps."""
    warmup: NonNegativeFloat = 0.03
    """Linear warm-up: below 1 a fraction of the steps, else a number of steps."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the steps that the decay of wsd takes."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step, as a fraction of lr."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    micro_batch_rows: Count = 1
    """Rows of one forward pass on one rank; accumulation follows from it. It changes speed and memory, never the result."""
    steps: Count | None = None
    """Optimizer steps, in place of what the budget gives."""
    evaluate_every: CountOrZero = 0
    """Steps between held-out evaluations; 0: only before the first and after the last step."""
    evaluate_rows: Count | None = None
    """Rows of each held-out source that an evaluation reads at most, spread evenly; default: all of them."""
    save_every: CountOrZero = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    log_every: Count = 10
    """Steps between two readings of the device; metrics.jsonl has a line for every step all the same."""
    prefetch_steps: Count = 2
    """Steps whose rows are made ready ahead of need."""
    loss_chunk_mib: Count = 256
    """Memory for the logits of one chunk of the loss, in MiB."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest whole checkpoint of `output` if there is one; never: refuse an output that holds a run."""
    export: bool = True
    """Write a Hugging Face folder to `output`/export after the last step."""


class Recipe(Settings):
    """A whole run."""

    model: ModelSettings
    sequence_length: Count
    """Tokens of a row."""
    rows_per_step: Count
    """Rows of one optimizer step, over all ranks and micro-batches."""
    objective: Literal["per_source", "per_token"] = "per_source"
    """per_source: a source's share is its weight in the gradient; per_token: the classic weighted mean over tokens."""
    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    """The streams that are mixed, by name."""
    held_out: dict[Name, str] = {}
    """Further prepared folders, by name, that are evaluated and never trained on; forgetting is measured on them too."""
    budget: Budget = Budget()
    train: Train
    deepspeed: str = "ds_configs/zero3.json"
    """File with DeepSpeed's own keys; what follows from this recipe is filled in."""
    output: str
    """Folder of the run."""
    seed: CountOrZero = 0
    """Decides the order of the data and the weights of a model from scratch."""

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        faults = [*self._budget_faults(), *self._source_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _budget_faults(self) -> list[str]:
        given = [name for name, value in self.budget if value is not None]
        if len(given) > 1:
            return [f"budget has {' and '.join(given)}; keep one of them, set the others to null"]
        if not given and self.train.steps is None:
            return [
                "budget is empty; give task_tokens, total_tokens or steps, such as budget.steps=1000"
            ]
        if given == ["task_tokens"] and not self.task_names:
            return [
                "budget.task_tokens counts tokens of task sources, and no source has role: task; "
                "give one that role, or use total_tokens or steps"
            ]
        return []

    def _source_faults(self) -> list[str]:
        both = [n for n, s in self.sources.items() if s.held_out is not None and n in self.held_out]
        return [
            f"held_out.{name} is given beside sources.{name}.held_out; keep one of them"
            for name in both
        ]

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the sources that the model is to learn."""
        return tuple(name for name, source in self.sources.items() if source.role == "task")

    @property
    def held_out_paths(self) -> dict[str, str]:
        """Every folder that is evaluated, by name: of the sources, then the further ones."""
        own = {n: s.held_out for n, s in self.sources.items() if s.held_out is not None}
        return own | self.held_out
