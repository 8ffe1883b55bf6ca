"""Measures what a checkpoint costs the training.

`python benchmarks/save.py [--layers 6] [--width 512] [--rounds 3]` lets the same model take the
same steps under ZeRO-3, once for each way to save after the first of them. It does so in rounds, so
that what else happens on the machine affects all ways alike. It prints how long the loop waited at
the save, how much longer all steps together took than without a save, and both as fractions of the
cost of a blocking save.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.world import world_of
from bigmix.data.records import MicroBatch, RankRows, StepBatch
from bigmix.loss.backend import backend_of, choose_backend
from bigmix.loss.objective import StepShares
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LossTerms
from bigmix.model.causal_lm import build, read_config
from bigmix.model.ds_config import BatchSize, complete, read_ds_config
from bigmix.model.engine import AdamW, Engine, device_of, join, sharded_construction
from bigmix.runs.checkpoints import Position
from bigmix.runs.saver import RetentionPolicy, Saver
from bigmix.train import step

VOCABULARY = 16_000
ROWS, TOKENS = 2, 256
STEPS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds that the loop waited at a save, and seconds of all steps."""

    wait_s: float
    all_s: float


def model_config(layers: int, width: int) -> dict[str, Any]:
    """The configuration of a llama."""
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": TOKENS,
    }


def make_engine(layers: int, width: int, ranks: int) -> Engine:
    """The engine that takes the steps."""
    batch_size = BatchSize(micro_batch_rows=ROWS, num_micro_batches=1, num_ranks=ranks)
    keys = complete(read_ds_config("ds_configs/cpu.json"), batch_size, "fp32", clip=1.0)
    model = build(
        read_config(None, model_config(layers, width)),
        None,
        dtype="fp32",
        attention="sdpa",
        activation_checkpointing=False,
        terms=LossTerms(),
        options=LossBackendOptions(
            backend=backend_of(choose_backend("torch", device_of(world_of(os.environ))).value)
        ),
        seed=0,
        construction=sharded_construction(keys),
    )
    return Engine(model, keys, AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))


def batch() -> StepBatch:
    """Rows of one source in which every token is in the loss."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
    starts = np.arange(ROWS) * TOKENS
    micro_batch = MicroBatch(
        ids_BT=ids,
        starts_P=starts,
        groups_P=np.zeros(ROWS, np.int64),
        begins_K=starts,
        lengths_K=np.full(ROWS, TOKENS - 1),
    )
    tokens = {"web": ROWS * TOKENS}
    return StepBatch(
        step=1,
        micro_batches=(micro_batch,),
        rows={"web": ROWS},
        substituted={"web": 0},
        tokens=tokens,
        loss_tokens={"web": ROWS * (TOKENS - 1)},
        sum_sq_lengths=0,
    )


def take_steps(
    engine: Engine, cluster: Cluster, save: Callable[[], None], settle: Callable[[], None]
) -> Cost:
    """Take STEPS steps, with a save after the first; `settle` is called before each."""
    rows, wait_s = batch(), 0.0
    objective = step.TrainingObjective(
        objective="per_source", document_weights={"web": "token"}, reference=None
    )
    ranks = cluster.world.size
    rank_rows = RankRows(
        rank=cluster.world.rank, ranks=ranks, rows_per_step=ROWS * ranks, micro_batch_rows=ROWS
    )
    shares = StepShares(rows={"web": 1.0}, loss={"web": 1.0})
    began = time.perf_counter()
    for index in range(STEPS):
        settle()
        ready = step.sync(cluster, rows, objective, rank_rows, stop=False).ready
        assert ready is not None
        settings = step.StepSettings(shares=shares, lr=1e-4, dropout_seed=index)
        result = step.run(engine, cluster, ready, objective, settings, lambda _: None)
        float(result.sums_SM.sum())
        if index == 0:
            at = time.perf_counter()
            save()
            wait_s = time.perf_counter() - at
    return Cost(wait_s=wait_s, all_s=time.perf_counter() - began)


def with_ours(engine: Engine, cluster: Cluster, folder: Path, saver: Saver) -> Cost:
    """The steps with a save of bigmix.

    What is still to be written after the last step is not measured.
    """
    position = Position(step=1, report={})
    cost = take_steps(
        engine, cluster, lambda: saver.save(engine.zero_state.flats(), position), saver.settle
    )
    saver.finish()
    shutil.rmtree(folder)
    return cost


def with_deepspeed(engine: Engine, cluster: Cluster, folder: Path) -> Cost:
    """The steps with the save of DeepSpeed."""
    cost = take_steps(
        engine,
        cluster,
        lambda: engine._engine.save_checkpoint(str(folder), tag="one"),
        lambda: None,
    )
    shutil.rmtree(folder)
    return cost


def measure(layers: int, width: int, rounds: int, folder: Path) -> tuple[dict[str, Cost], float]:
    """The median cost of each way to save over some rounds, and the GiB of a checkpoint."""
    world = world_of(os.environ)
    cluster = join(world)
    engine = make_engine(layers, width, world.size)
    savers = {
        title: Saver(
            folder, cluster, RetentionPolicy(newest=1), in_background=in_background, report=print
        )
        for title, in_background in (("bigmix, blocking", False), ("bigmix, background", True))
    }
    costs: dict[str, list[Cost]] = {}
    for _ in range(rounds + 1):
        found = {"no save": take_steps(engine, cluster, lambda: None, lambda: None)}
        found["DeepSpeed"] = with_deepspeed(engine, cluster, folder)
        for title, saver in savers.items():
            found[title] = with_ours(engine, cluster, folder, saver)
        for title, cost in found.items():
            costs.setdefault(title, []).append(cost)
    size = (
        sum(3 * 4 * flat.weights.numel() for flat in engine.zero_state.flats()) * world.size / 2**30
    )
    leave()
    # The first round fills caches and allocates the buffers that later saves use again.
    medians = {
        title: Cost(
            wait_s=median(c.wait_s for c in many[1:]), all_s=median(c.all_s for c in many[1:])
        )
        for title, many in costs.items()
    }
    return medians, size


def table(costs: dict[str, Cost], gib: float) -> Table:
    """One line for each way to save."""
    plain, blocking = costs["no save"].all_s, costs["bigmix, blocking"]
    full = blocking.all_s - plain
    rows = [
        (
            title,
            f"{cost.wait_s:.3f}",
            f"{cost.wait_s / blocking.wait_s:.0%}",
            f"{cost.all_s - plain:+.3f}",
            f"{(cost.all_s - plain) / full:.0%}",
        )
        for title, cost in costs.items()
        if title != "no save"
    ]
    return Table(
        heading=f"A checkpoint of {gib:.2f} GiB, {STEPS} steps of {plain / STEPS:.2f} s",
        columns=("save", "wait s", "/ blocking", "steps longer by s", "/ blocking"),
        rows=rows,
        notes=[],
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        costs, gib = measure(arguments.layers, arguments.width, arguments.rounds, folder / "saves")
        print(table(costs, gib).text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
