"""The functions of the Python API that are more than another name for one of the package.

Users import them from `bigmix` (docs/api.md). Nothing here imports torch before it is needed:
plans and batches are numpy.
"""

import json
import logging
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigmix.cluster.signals import handlers_put_back, stop_requests_here
from bigmix.cluster.supervisor import LaunchSpec, StopRequests, supervise
from bigmix.commands.train import report_restart, start_ranks
from bigmix.data.loader import open_loader
from bigmix.data.records import MicroBatch, RankRows, RowId, StepBatch
from bigmix.data.run_plan import RunPlan
from bigmix.errors import BAD_INPUT, DONE, REQUEUE, BadInput, BigmixError, Interrupted
from bigmix.recipe import Recipe, to_yaml
from bigmix.runs.layout import progress
from bigmix.terminal import Terminal, quiet_third_party_logs
from bigmix.train.inputs import RunInputs, open_inputs
from bigmix.types import IGNORE, Ints

if TYPE_CHECKING:
    import torch

# What a run sets for libraries that read the environment of a launcher.
_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What each step of a run trains, known before anything is trained; steps count from 1.

    `num_steps` is the length of the run, and `notes` are what there is to know about it: limits of
    epochs that change it, shares that controllers will move.
    """

    num_steps: int
    num_ranks: int
    notes: Sequence[str]
    run_plan: RunPlan = field(repr=False)

    def shares(self, step: int) -> dict[str, float]:
        """The share of each source in the rows of a step; they add up to 1."""
        return dict(self.run_plan.shares_of_step(self._checked(step)).rows)

    def loss_shares(self, step: int) -> dict[str, float]:
        """The share of each source in the gradient of a step; they add up to 1."""
        return dict(self.run_plan.shares_of_step(self._checked(step)).loss)

    def num_rows(self, step: int) -> dict[str, int]:
        """How many rows of each source a step has over all ranks."""
        after, before = self.run_plan.counts(self._checked(step)), self.run_plan.counts(step - 1)
        return {name: after[name] - before[name] for name in after}

    def rows(self, step: int, rank: int | None = None) -> list[RowId]:
        """Which rows a step has: those of one rank, or of all ranks one after another."""
        rows = self.run_plan.row_ids(self._checked(step))
        if rank is None:
            return rows
        each = len(rows) // self.num_ranks
        return rows[_checked_rank(rank, self.num_ranks) * each :][:each]

    def epochs(self, step: int | None = None) -> dict[str, float]:
        """How often each source has been gone through after a step, by default after the last."""
        return self.run_plan.epochs(self.num_steps if step is None else self._checked(step))

    def _checked(self, step: int) -> int:
        if not 1 <= step <= self.num_steps:
            raise BadInput(f"step is {step}, must be from 1 to {self.num_steps}, the run's last")
        return step


def plan(recipe: Recipe, *, num_ranks: int = 1) -> TrainingPlan:
    """Open the sources of a recipe and work out what each step would train; needs no GPU.

    Raises BadInput with every fault of the recipe and its sources.
    """
    inputs = _opened(recipe, num_ranks)
    return TrainingPlan(
        num_steps=inputs.plan.steps, num_ranks=num_ranks, notes=inputs.notes, run_plan=inputs.plan
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """The rows of one forward pass on one rank: B rows of T tokens, each packed from one source.

    All arrays are int64. `labels` are as transformers has them, each at the position of its own
    token, for a model that shifts them itself; `targets[b, t]` is the token that position t has to
    predict. Both are -100 where there is no loss. `position_ids` begin at 0 at each document, and
    attention must not cross from one to the next.

    input_ids, labels, targets, position_ids: [B, T]
    source_ids: the source of each row [B], an index into `TrainingBatches.source_names`
    step: the optimizer step, counted from 1, and whether this is its last batch on this rank
    num_loss_tokens: loss tokens of each source in the whole step, on this rank
    micro_batch: the same rows as bigmix itself trains them
    """

    step: int
    is_last_of_step: bool
    input_ids: Ints
    labels: Ints
    targets: Ints
    position_ids: Ints
    source_ids: Ints
    num_loss_tokens: Mapping[str, int]
    micro_batch: MicroBatch

    def tensors(self, device: "torch.device | str" = "cpu") -> "dict[str, torch.Tensor]":
        """`input_ids`, `labels` and `position_ids`, the arguments of a model of transformers."""
        import torch  # seconds, and only for those who ask for tensors

        arrays = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
        }
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


class TrainingBatches:
    """The batches of one rank from a step on, as an iterator that can be used in a `with` block.

    A thread reads ahead of need; it ends with the block, with the last batch, or by `close`.
    Iterating raises BadShard, a BigmixError, where a shard cannot be read.
    """

    def __init__(
        self, inputs: RunInputs, rank_rows: RankRows, *, first_step: int, ahead: int
    ) -> None:
        self.num_steps = inputs.plan.steps
        self.source_names: Sequence[str] = inputs.plan.mixture.names
        self._store = inputs.shard_store
        self._loader = open_loader(
            inputs.plan, inputs.sources, self._store, rank_rows, first=first_step, ahead=ahead
        )
        self._batches = self._all()

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading; what was read ahead is thrown away."""
        self._batches.close()
        self._stop()

    def _all(self) -> Generator[TrainingBatch, None, None]:
        try:
            for step_batch in self._loader:
                for micro_batch in step_batch.micro_batches:
                    yield _training_batch(step_batch, micro_batch)
        finally:
            self._stop()

    def _stop(self) -> None:
        # The store first: the loader's thread may wait for a shard that never comes.
        self._store.close()
        self._loader.close()


def batches(
    recipe: Recipe, *, rank: int = 0, num_ranks: int = 1, first_step: int = 1
) -> TrainingBatches:
    """The batches that a run of this recipe trains on one rank, for a training loop of any kind.

    A step has the same rows on any number of ranks, and the step is the whole position: a loop that
    has trained k steps goes on with `first_step=k + 1`. A step has `recipe.rows_per_step` rows, of
    which each rank has an equal part in batches of `recipe.train.micro_batch_rows`.

    Raises BadInput with every fault of the recipe and its sources.
    """
    inputs = _opened(recipe, num_ranks)
    steps = inputs.plan.steps
    if not 1 <= first_step <= steps + 1:
        raise BadInput(
            f"first_step is {first_step}, must be from 1 to {steps + 1}: the run has {steps} steps,"
            " and after the last there is none left"
        )
    rank_rows = RankRows(
        rank=_checked_rank(rank, num_ranks),
        ranks=num_ranks,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=recipe.train.micro_batch_rows,
    )
    return TrainingBatches(
        inputs, rank_rows, first_step=first_step, ahead=recipe.train.prefetch_steps
    )


def run_training(recipe: Recipe, *, num_ranks: int = 1, num_restarts: int = 3) -> Path:
    """Train a recipe to the end of its budget, or from where it was stopped; returns its folder.

    One rank trains in this process. Several are processes of their own, as `bigmix train` starts
    them, and are started again up to `num_restarts` times where one fails. In the main thread
    SIGINT, SIGTERM and SIGUSR1 request a stop; their handlers are put back afterwards.

    Raises BadInput where nothing was started, Interrupted after a stop request, when the same call
    resumes, and BigmixError where the run failed.
    """
    _check_can_train(recipe, num_ranks, num_restarts)
    # Several ranks read the shards through themselves.
    inputs = _opened(recipe, num_ranks, verify=num_ranks == 1)
    if num_ranks == 1:
        _train_here(recipe, inputs)
    else:
        _train_supervised(recipe, num_ranks, num_restarts)
    return Path(recipe.output)


def compare(run_folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Write what `bigmix compare` writes into the folder `out`, and return what is in its
    `summary.json`, which docs/compare.md describes.

    Raises BadInput where a folder holds no run that can be compared, before anything is written.
    """
    # Seconds of matplotlib.
    from bigmix.commands.compare.report import compare as write_comparison

    write_comparison([Path(folder) for folder in run_folders], Path(out))
    summary: dict[str, Any] = json.loads((Path(out) / "summary.json").read_text(encoding="utf-8"))
    return summary


def _opened(recipe: Recipe, num_ranks: int, *, verify: bool = False) -> RunInputs:
    if num_ranks < 1:
        raise BadInput(f"num_ranks is {num_ranks}, must be 1 or more")
    return open_inputs(recipe, ranks=num_ranks, verify=verify)


def _checked_rank(rank: int, num_ranks: int) -> int:
    if not 0 <= rank < num_ranks:
        raise BadInput(f"rank is {rank}, must be from 0 to {num_ranks - 1} with {num_ranks} ranks")
    return rank


def _training_batch(step_batch: StepBatch, micro_batch: MicroBatch) -> TrainingBatch:
    input_ids = micro_batch.ids_BT.astype(np.int64)
    num_rows, row_tokens = input_ids.shape
    flat_ids = input_ids.reshape(-1)
    kept_N, starts_P = micro_batch.kept_N, micro_batch.starts_P.astype(np.int64)
    labels, targets = np.full((2, input_ids.size), IGNORE, np.int64)
    # The last position of a row predicts nothing, so the token after a kept one is in its row.
    targets[kept_N] = labels[kept_N + 1] = flat_ids[kept_N + 1]
    lengths_P = np.diff(starts_P, append=input_ids.size)
    position_ids = np.arange(input_ids.size) - np.repeat(starts_P, lengths_P)
    first_B = np.searchsorted(starts_P, np.arange(num_rows) * row_tokens)
    return TrainingBatch(
        step=step_batch.step,
        is_last_of_step=micro_batch is step_batch.micro_batches[-1],
        input_ids=input_ids,
        labels=labels.reshape(input_ids.shape),
        targets=targets.reshape(input_ids.shape),
        position_ids=position_ids.reshape(input_ids.shape),
        source_ids=micro_batch.groups_P[first_B].astype(np.int64),
        num_loss_tokens=step_batch.loss_tokens,
        micro_batch=micro_batch,
    )


def _check_can_train(recipe: Recipe, num_ranks: int, num_restarts: int) -> None:
    faults = []
    if recipe.sweep is not None:
        faults.append(
            "the recipe is a sweep, and this trains one run; load one of its runs with the override"
            " sweep.only=NAME, or train all with `bigmix train`"
        )
    if num_restarts < 0:
        faults.append(f"num_restarts is {num_restarts}, must be 0 or more")
    if (size := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        faults.append(
            f"a launcher has started this process as one of {size}, and run_training starts its"
            f" ranks itself (num_ranks is {num_ranks}); let the launcher start launch/train.py"
        )
    if faults:
        raise BadInput(*faults)


def _train_here(recipe: Recipe, inputs: RunInputs) -> None:
    with _process_put_back(), stop_requests_here() as stop_signal:
        quiet_third_party_logs()
        # Seconds of imports, and only for a recipe that can run.
        from bigmix.train.run import run_here

        run_here(recipe, inputs, Terminal(every=1), stop_signal)


@contextmanager
def _process_put_back() -> Iterator[None]:
    """What a run changes for the rest of its process is afterwards as it was before: the
    launcher's part of the environment, and where the root logger writes.
    """
    environment = {name: os.environ[name] for name in _LAUNCHER if name in os.environ}
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    # Out of reach of the run, which closes those that it finds.
    logger.handlers[:] = []
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logging.captureWarnings(False)
        for name in _LAUNCHER:
            os.environ.pop(name, None)
        os.environ.update(environment)


def _train_supervised(recipe: Recipe, num_ranks: int, num_restarts: int) -> None:
    with handlers_put_back(), tempfile.TemporaryDirectory(prefix="bigmix-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        spec = LaunchSpec(
            start=lambda: start_ranks("train", num_ranks, [str(path)]),
            newest_step=lambda: progress([recipe]),
            max_restarts=num_restarts,
        )
        code = supervise(spec, StopRequests(), report_restart)
    reasons = f"the ranks' messages are on stderr, their logs in {recipe.output}/log"
    if code == BAD_INPUT:
        raise BadInput(f"the {num_ranks} ranks refused the recipe; {reasons}")
    if code == REQUEUE:
        raise Interrupted(f"stopped on request; the same call goes on from there; {reasons}")
    if code != DONE:
        raise BigmixError(f"training in {recipe.output} ended with {code}; {reasons}")
