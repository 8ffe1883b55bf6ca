"""What the ranks of distributed tests run: `python -m support.workers.engines FUNCTION ARGUMENTS
OUTPUT`.
"""

import json
import os
import sys
import weakref
from pathlib import Path

import deepspeed
import numpy as np
import torch
import transformers
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from support.models import FAMILIES, VOCABULARY

from bigmix.cluster.collectives import leave
from bigmix.cluster.world import world_of
from bigmix.data.records import MicroBatch, RankRows, StepBatch
from bigmix.loss.objective import StepShares
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import GroupSums, LossTerms
from bigmix.loss.torch_kernel import torch_backend
from bigmix.model.causal_lm import InferenceLM, build, load, read_config
from bigmix.model.ds_config import BatchSize, complete, read_ds_config
from bigmix.model.engine import (
    AdamW,
    Engine,
    InferenceEngine,
    join,
    release_memory,
    sharded_construction,
    whole_parameters,
)
from bigmix.model.export import export
from bigmix.model.inputs import ReferenceModel, to_device
from bigmix.runs.resume import locked_folder
from bigmix.train import step

ROW = 64
NO_TERMS = LossTerms()
ALL_TERMS = LossTerms(label_smoothing=0.1, z_loss=1e-2, entropy=True)
KAPPAS = {"web": 0.3, "rare": 0.7}
WEIGHING = {"web": "square_root", "chat": "document"}
SOURCES = ("web", "chat", "rare")
SHARES = StepShares(
    rows={"web": 0.5, "chat": 0.25, "rare": 0.25}, loss={"web": 0.7, "chat": 0.25, "rare": 0.05}
)


def documents(packed):
    """Eight rows as lists of (ids, in-loss flags) with very unequal loss-token counts; one row has
    none at all.
    """
    draw = np.random.default_rng(5)
    rows = []
    for index, source in enumerate(["web", "web", "web", "web", "chat", "chat", "rare", "chat"]):
        lengths = draw.permutation([5, 9, 17, 30]) if packed else [draw.integers(8, ROW)]
        parts = []
        for length in lengths:
            ids = draw.integers(3, VOCABULARY, length)
            flags = np.ones(length, bool) if source == "web" else draw.random(length) < 0.15
            if index in (2, 6) and source == "web":
                flags[:] = False
            parts.append((ids, flags))
        if source == "rare":
            parts[-1][1][-1] = True
        rows.append((source, parts))
    return rows


def micro_batch(rows):
    """Rows, each (source, parts), as a micro-batch in which each loss token is a run of its own."""
    ids = np.zeros((len(rows), ROW), np.int32)
    starts, groups, begins = [], [], []
    for row, (source, parts) in enumerate(rows):
        at = 0
        for part_ids, flags in parts:
            n = len(part_ids)
            starts.append(row * ROW + at)
            ids[row, at : at + n] = part_ids
            begins += (row * ROW + at + np.flatnonzero(flags[1:])).tolist()
            at += n
        if at < ROW:
            starts.append(row * ROW + at)
        groups += [SOURCES.index(source)] * (len(parts) + (at < ROW))
    return MicroBatch(
        ids_BT=ids,
        starts_P=np.array(starts),
        groups_P=np.array(groups),
        begins_K=np.array(begins, np.int64),
        lengths_K=np.ones(len(begins), np.int64),
    )


def loss_tokens(rows, name):
    return sum(int(f[1:].sum()) for source, parts in rows if source == name for _, f in parts)


def batch_of(rows, rank, ranks, accumulation):
    own = rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]
    size = len(own) // accumulation
    return StepBatch(
        step=1,
        micro_batches=tuple(micro_batch(own[i : i + size]) for i in range(0, len(own), size)),
        rows={s: sum(source == s for source, _ in rows) for s in SOURCES},
        substituted=dict.fromkeys(SOURCES, 0),
        tokens=dict.fromkeys(SOURCES, 1),
        loss_tokens={s: loss_tokens(own, s) for s in SOURCES},
        sum_sq_lengths=0,
    )


def aim(objective, reference=None, document_weights=None):
    document_weights = dict.fromkeys(SOURCES, "token") | (document_weights or {})
    return step.TrainingObjective(
        objective=objective, document_weights=document_weights, reference=reference
    )


class RecordingEngine(Engine):
    """Keeps the whole gradient of every parameter as it is just before the optimizer moves the
    weights.
    """

    gradients: dict

    def step_micro_batch(self, lr):
        if self._engine.is_gradient_accumulation_boundary():
            self.gradients = {
                name: safe_get_full_grad(p).double().clone()
                for name, p in self.module.named_parameters()
            }
        super().step_micro_batch(lr)


def filled(accumulation, ranks, file="ds_configs/cpu.json", dtype="fp32"):
    batch = BatchSize(
        micro_batch_rows=8 // ranks // accumulation,
        num_micro_batches=accumulation,
        num_ranks=ranks,
    )
    return complete(read_ds_config(file), batch, dtype, clip=0.0)


def make_engine(
    family,
    accumulation,
    ranks,
    file="ds_configs/cpu.json",
    dtype="fp32",
    terms=NO_TERMS,
    checkpointing=False,
    ema=None,
):
    keys = filled(accumulation, ranks, file, dtype)
    config = read_config(None, FAMILIES[family])
    model = build(
        config,
        None,
        dtype=dtype,
        attention="eager" if family == "gemma" else "sdpa",
        activation_checkpointing=checkpointing,
        terms=terms,
        options=LossBackendOptions(backend=torch_backend, chunk_bytes=VOCABULARY * 4 * 20),
        seed=3,
        construction=sharded_construction(keys),
    )
    return RecordingEngine(model, keys, AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), ema)


def whole_weights(engine):
    """Every weight, gathered, in fp64."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {n: p.detach().double().clone() for n, p in engine.module.named_parameters()}


def reference(family, weights, rows, objective):
    """Objective and gradients of a plain fp64 model that is shown one document at a time, unpacked
    and unpadded.
    """
    config = read_config(None, FAMILIES[family])
    model = build(
        config,
        None,
        dtype="fp32",
        attention="eager",
        activation_checkpointing=False,
        terms=LossTerms(),
        options=LossBackendOptions(backend=torch_backend),
        seed=0,
        construction=sharded_construction({}),
    ).double()
    model.load_state_dict(weights, strict=False)
    sums, counts = dict.fromkeys(SOURCES, 0.0), dict.fromkeys(SOURCES, 0)
    for source, parts in rows:
        for ids, flags in parts:
            logits = model.lm(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].double()
            nll = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(ids[1:]), reduction="none"
            )
            sums[source] = sums[source] + nll[torch.from_numpy(flags[1:])].sum()
            counts[source] += int(flags[1:].sum())
    if objective == "per_source":
        value = sum(SHARES.loss[s] * sums[s] / counts[s] for s in SOURCES)
    else:
        w = {s: SHARES.loss[s] / SHARES.rows[s] for s in SOURCES}
        value = sum(w[s] * sums[s] for s in SOURCES) / sum(w[s] * counts[s] for s in SOURCES)
    value.backward()
    return {n: p.grad for n, p in model.named_parameters()}, {s: float(v) for s, v in sums.items()}


def take_step(engine, cluster, batch, aim, *, lr=1e-3, chance=0):
    """A step on batches that all ranks have."""
    rows = len(batch.micro_batches[0].ids_BT)
    rank_rows = RankRows(
        rank=cluster.world.rank,
        ranks=cluster.world.size,
        rows_per_step=rows * len(batch.micro_batches) * cluster.world.size,
        micro_batch_rows=rows,
    )
    synced = step.sync(cluster, batch, aim, rank_rows, stop=False)
    settings = step.StepSettings(shares=SHARES, lr=lr, dropout_seed=chance)
    return step.run(engine, cluster, synced.ready, aim, settings, lambda _: None)


def gradient_errors(rank, ranks, cluster, families):
    """For each case the largest relative gradient error over the parameters, and of the nll
    sums.
    """
    errors = {}
    for family in families:
        for accumulation in (1, 4):
            engine = make_engine(family, accumulation, ranks)
            for packed in (True, False):
                rows = documents(packed)
                batch = batch_of(rows, rank, ranks, accumulation)
                for objective in ("per_source", "per_token"):
                    weights = whole_weights(engine)
                    result = take_step(engine, cluster, batch, aim(objective))
                    expected, sums = reference(family, weights, rows, objective)
                    worst = max(
                        float((engine.gradients[n] - g).norm() / g.norm())
                        for n, g in expected.items()
                    )
                    nll = max(
                        abs(float(v) / sums[s] - 1)
                        for s, v in zip(SOURCES, GroupSums.of(result.sums_SM).nll_G, strict=True)
                    )
                    errors[
                        f"{family} x{accumulation} {'packed' if packed else 'unpacked'} {objective}"
                    ] = [worst, nll]
    return errors


def make_anchor(family, accumulation, ranks, device, file):
    keys = filled(accumulation, ranks, file)
    config = read_config(None, FAMILIES[family])
    lm = load(
        config,
        None,
        dtype="fp32",
        attention="eager",
        seed=4,
        construction=sharded_construction(keys),
    )
    model = InferenceLM(lm)
    return ReferenceModel(model=model, engine=InferenceEngine(model, keys, device), weights=KAPPAS)


def weight_of(source, flags):
    power = {"square_root": -0.5, "document": -1.0}.get(WEIGHING.get(source), 0.0)
    return max(1, int(flags[1:].sum())) ** power


def dense_objective(family, weights, other, theirs, rows):
    """All terms of the objective by plain fp64 models, document by document: gradients and mean KL
    of each source.
    """
    model, frozen = (
        load(
            read_config(None, FAMILIES[name]),
            None,
            dtype="fp32",
            attention="eager",
            seed=0,
            construction=sharded_construction({}),
        ).double()
        for name in (family, other)
    )
    model.load_state_dict({n.removeprefix("lm."): w for n, w in weights.items()}, strict=False)
    frozen.load_state_dict({n.removeprefix("lm."): w for n, w in theirs.items()}, strict=False)
    counts = {s: loss_tokens(rows, s) for s in SOURCES}
    masses = dict.fromkeys(SOURCES, 0.0)
    for source, parts in rows:
        for _, flags in parts:
            masses[source] += int(flags[1:].sum()) * weight_of(source, flags)
    value, kl_sums = 0.0, dict.fromkeys(SOURCES, 0.0)
    for source, parts in rows:
        for ids, flags in parts:
            kept = torch.from_numpy(flags[1:])
            labels = torch.from_numpy(ids[1:])[kept]
            shown = torch.from_numpy(ids)[None]
            logits = model(input_ids=shown).logits[0, :-1][kept]
            log_p = logits.log_softmax(1)
            eps = ALL_TERMS.label_smoothing
            nll = torch.nn.functional.nll_loss(log_p, labels, reduction="sum")
            loss = (1 - eps) * nll - eps * log_p.mean(1).sum()
            loss = loss + ALL_TERMS.z_loss * logits.logsumexp(1).square().sum()
            with torch.no_grad():
                log_q = frozen(input_ids=shown).logits[0, :-1][kept].log_softmax(1)
            kl = (log_q.exp() * (log_q - log_p)).sum()
            kl_sums[source] += float(kl.detach())
            loss = SHARES.loss[source] * weight_of(source, flags) * loss / masses[source]
            value = value + loss + KAPPAS.get(source, 0) * kl / counts[source]
    value.backward()
    gradients = {f"lm.{n}": p.grad for n, p in model.named_parameters()}
    return gradients, {s: kl_sums[s] / counts[s] for s in KAPPAS}


def whole_objective_errors(rank, ranks, cluster, families, other, file):
    """The largest relative gradient error with every term of the objective, and the largest error
    of a source's mean KL in nats.
    """
    errors = {}
    for family in families:
        for accumulation in (1, 4):
            engine = make_engine(
                family, accumulation, ranks, file, terms=ALL_TERMS, checkpointing=True
            )
            reference = make_anchor(other, accumulation, ranks, engine.device, file)
            rows = documents(True)
            batch = batch_of(rows, rank, ranks, accumulation)
            with deepspeed.zero.GatheredParameters(list(reference.model.parameters())):
                theirs = {
                    n: p.detach().double().clone() for n, p in reference.model.named_parameters()
                }
            weights = whole_weights(engine)
            result = take_step(engine, cluster, batch, aim("per_source", reference, WEIGHING))
            expected, kl = dense_objective(family, weights, other, theirs, rows)
            worst = max(
                float((engine.gradients[n] - g).norm() / g.norm()) for n, g in expected.items()
            )
            sums = GroupSums.of(result.sums_SM)
            means = (sums.kl_G / sums.tokens_G).tolist()
            kl_error = max(abs(means[SOURCES.index(s)] - kl[s]) for s in KAPPAS)
            other_kl = max(means[i] for i, s in enumerate(SOURCES) if s not in KAPPAS)
            errors[f"{family} x{accumulation}"] = [worst, kl_error, other_kl]
    return errors


def gathers_of_the_head(rank, ranks, cluster, family):
    """How often the head's weight is gathered in each of three steps, forward and backward, of 4
    micro-batches.
    """
    engine = make_engine(family, 4, ranks)
    head = engine.module.lm.get_output_embeddings().weight
    counts = []
    # DeepSpeed gathers a group of parameters through a method of its first one.
    for parameter in engine.module.parameters():
        original = parameter.all_gather_coalesced

        def counted(params, *arguments, original=original, **options):
            counts[-1] += sum(p is head for p in params)
            return original(params, *arguments, **options)

        parameter.all_gather_coalesced = counted
    for _ in range(3):
        counts.append(0)
        take_step(engine, cluster, batch_of(documents(True), rank, ranks, 4), aim("per_source"))
    return counts


def units_of_gathering(rank, ranks, cluster, families, file):
    """For each family the modules whose weights are gathered together, of the trained model and of
    a frozen one.
    """
    found = {}
    for family in families:
        engine = make_engine(family, 1, ranks, file)
        reference = make_anchor(family, 1, ranks, engine.device, file)
        found[family] = [
            [type(module).__name__ for module in get_z3_leaf_modules(model)]
            for model in (engine.module, reference.model)
        ]
    return found


def weights_after_an_evaluation(rank, ranks, cluster, file):
    """The sum of each weight of a deep model, gathered on its own after two steps and a forward
    without a gradient; and of all together.
    """
    FAMILIES["deep"] = FAMILIES["qwen"] | {"num_hidden_layers": 12}
    engine = make_engine("deep", 1, ranks, file)
    batch = batch_of(documents(True), rank, ranks, 1)
    (micro_batch,) = batch.micro_batches
    tensors = to_device(micro_batch, [0.0] * len(SOURCES), engine.device)
    for num_steps in (0, 2):
        for _ in range(num_steps):
            take_step(engine, cluster, batch, aim("per_source"))
        with engine.evaluating():
            engine.forward(tensors)
    gathered = {
        name: float(weight.double().sum()) for name, weight in whole_parameters(engine.module)
    }
    together = {name: float(weight.sum()) for name, weight in whole_weights(engine).items()}
    return [gathered, together]


def models_left(rank, ranks, cluster):
    """For each of three engines, one after another, whether its model or its reference is still
    there once it is closed.
    """
    left = []
    for _ in range(3):
        engine = make_engine("llama", 4, ranks)
        reference = make_anchor("llama", 4, ranks, engine.device, "ds_configs/cpu.json")
        batch = batch_of(documents(True), rank, ranks, 4)
        take_step(engine, cluster, batch, aim("per_source", reference))
        models = [weakref.ref(engine.module), weakref.ref(reference.model)]
        engine.close()
        del engine, reference
        release_memory()
        left.append([model() is not None for model in models])
    return left


def sharded_build(rank, ranks, cluster):
    """For each family: the largest part of a weight that is held here, and of each weight its
    spread and its sum.
    """
    found = {}
    for family, settings in FAMILIES.items():
        batch = BatchSize(micro_batch_rows=1, num_micro_batches=1, num_ranks=ranks)
        keys = complete(read_ds_config("ds_configs/cpu.json"), batch, "fp32", clip=0.0)
        model = build(
            read_config(None, settings),
            None,
            dtype="fp32",
            attention="eager",
            activation_checkpointing=False,
            terms=LossTerms(),
            options=LossBackendOptions(backend=torch_backend),
            seed=3,
            construction=sharded_construction(keys),
        )
        assert all(p.numel() == 0 for p in model.parameters())
        weights = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().double()
                weights[name] = {"std": float(whole.std()), "sum": float(whole.sum())}
        parts = [p.ds_tensor.numel() / p.ds_numel for p in model.parameters()]
        found[family] = {"largest_part": max(parts), "weights": weights}
    return found


def export_differences(rank, ranks, cluster, folder, families, file, dtype, shard_bytes):
    """For each family: the largest difference of the exported model's logits to the engine's, and
    its files.
    """
    found = {}
    ids = torch.arange(3, 43)[None]
    for family in families:
        engine = make_engine(family, 1, ranks, file, dtype, ema=0.5)
        take_step(engine, cluster, batch_of(documents(True), rank, ranks, 1), aim("per_source"))
        with engine.evaluating():
            before = engine.module.lm(input_ids=ids).logits
        path = Path(folder) / family
        export(
            engine,
            cluster,
            Path(folder) / "no-tokenizer",
            path,
            shard_bytes=shard_bytes,
            texts={"README.md": "# a model"},
            on_activity=lambda _: None,
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", attn_implementation=engine.module.lm.config._attn_implementation
        ).eval()
        with torch.no_grad():
            difference = float((loaded(input_ids=ids).logits - before).abs().max())
        files = sorted(file.name for file in path.iterdir())
        found[family] = [difference, str(loaded.dtype), files]
    return found


def holds(rank, ranks, cluster, folder):
    """Whether the folder of a run is ours, twice in a row."""
    found = []
    for _ in range(2):
        with locked_folder(Path(folder), cluster, wait_s=0.3) as is_ours:
            found.append(is_ours)
    return found


def main(functions):
    function, arguments, output = sys.argv[1:]
    world = world_of(os.environ)
    cluster = join(world)
    result = functions[function](world.rank, world.size, cluster, **json.loads(arguments))
    Path(output).write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(globals())
