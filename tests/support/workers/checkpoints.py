"""What the ranks of the tests of checkpoints run: `python -m support.workers.checkpoints FUNCTION
ARGUMENTS OUTPUT`.
"""

import hashlib
import resource
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from support.workers.engines import (
    aim,
    batch_of,
    documents,
    main,
    make_engine,
    take_step,
    whole_weights,
)

from bigmix.runs.checkpoints import Position
from bigmix.runs.resume import newest_complete
from bigmix.runs.saver import RetentionPolicy, Saver
from bigmix.runs.state_file import StateReader


def digest(tensor):
    return hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def whole_state(engine):
    """Weights, both moments and the model's own weights of every parameter, gathered by DeepSpeed's
    own functions.
    """
    model = whole_weights(engine)
    zero = engine._engine.optimizer
    if engine._engine.zero_optimization_stage() < 3:
        # DeepSpeed may have looked for the moments before there were any.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return {
        name: [
            digest(safe_get_full_fp32_param(p)),
            digest(safe_get_full_optimizer_state(p, "exp_avg")),
            digest(safe_get_full_optimizer_state(p, "exp_avg_sq")),
            digest(model[name]),
        ]
        for name, p in engine.module.named_parameters()
    }


def steps_of_adam(engine):
    return sorted({flat.step for flat in engine.states()})


def train(engine, cluster, rank, ranks, count):
    batch = batch_of(documents(True), rank, ranks, 1)
    for index in range(count):
        result = take_step(engine, cluster, batch, aim("per_source"), lr=1e-2, chance=index)
    return result.sums_SM.tolist()


def saver(folder, cluster, said=None, keep=9, every=0, in_background=True):
    tell = (said if said is not None else []).append
    keeping = RetentionPolicy(newest=keep, every=every)
    return Saver(Path(folder), cluster, keeping, in_background=in_background, tell=tell)


def saved(rank, ranks, cluster, folder, family, file, dtype):
    """The state after three steps, which is then saved in the background while a fourth one is
    taken; and that step's sums.
    """
    engine = make_engine(family, 1, ranks, file, dtype)
    train(engine, cluster, rank, ranks, 3)
    saves = saver(folder, cluster)
    state, taken = whole_state(engine), steps_of_adam(engine)
    saves.save(engine.states(), Position(step=3, report={"seen": 24}))
    sums = train(engine, cluster, rank, ranks, 1)
    saves.close()
    return {"state": state, "steps": taken, "sums": sums}


def restored(rank, ranks, cluster, folder, family, file, dtype):
    """The state of a new engine that has read the newest checkpoint, and the sums of a step from
    there.
    """
    engine = make_engine(family, 1, ranks, file, dtype)
    listed = newest_complete(Path(folder), cluster).listed
    engine.put_back(StateReader(listed.path).fill)
    state, taken = whole_state(engine), steps_of_adam(engine)
    sums = train(engine, cluster, rank, ranks, 1)
    again = whole_state(engine)
    return {
        "state": state,
        "steps": taken,
        "sums": sums,
        "wrote": listed.ranks,
        "after": again,
        "report": dict(listed.position.report),
    }


def many_saves(rank, ranks, cluster, folder, in_background):
    """Saves after each of six steps, of which two newest and every third stay; seconds that the
    loop waited for them.
    """
    engine = make_engine("llama", 1, ranks)
    said = []
    saves = saver(folder, cluster, said, keep=2, every=3, in_background=in_background)
    for index in range(1, 7):
        train(engine, cluster, rank, ranks, 1)
        saves.settle()
        saves.save(engine.states(), Position(step=index, report={}))
    saves.close()
    return {"said": said, "last": saves.last_step, "wait_s": saves.wait_s}


def saves_that_fail(rank, ranks, cluster, folder):
    """What is said and the last whole step after each of four saves, of which rank 1 may not write
    the second to its end.
    """
    engine = make_engine("llama", 1, ranks)
    said, found = [], []
    saves = saver(folder, cluster, said)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for index in range(1, 5):
        train(engine, cluster, rank, ranks, 1)
        if rank == 1:
            most = 50_000 if index == 2 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        saves.save(engine.states(), Position(step=index, report={}))
        saves.finish()
        found.append(saves.last_step)
    saves.close()
    return {"said": said, "found": found, "failed": sum("the run goes on" in text for text in said)}


def saves_on_a_small_disk(rank, ranks, cluster, folder):
    """The same where the second save finds too little room on the disk, and the third enough
    again.
    """
    engine = make_engine("llama", 1, ranks)
    said, found = [], []
    saves = saver(folder, cluster, said)
    ballast = Path(folder).parent / "ballast"
    for index in range(1, 4):
        train(engine, cluster, rank, ranks, 1)
        if rank == 0 and index == 2:
            ballast.write_bytes(bytes(10 << 20))
        if rank == 0 and index == 3:
            ballast.unlink()
        saves.save(engine.states(), Position(step=index, report={}))
        saves.finish()
        found.append(saves.last_step)
    saves.close()
    return {"said": said, "found": found, "failed": sum("the run goes on" in text for text in said)}


DECAY = 0.9


def masters(engine):
    """The fp32 weights of the optimizer, whole."""
    return {
        name: safe_get_full_fp32_param(p).detach().float().clone()
        for name, p in engine.module.named_parameters()
    }


def averages(rank, ranks, cluster, folder, family, file, dtype, first, last):
    """After each of some steps, the largest differences of the kept average to a dense one, in the
    engine's and the model's weights.

    From a checkpoint where `first` is above 1; the last step is saved. `exact`: whether weights and
    moments are the same after evaluations as before; `sums` are those of the last step.
    """
    engine = make_engine(family, 1, ranks, file, dtype, ema=DECAY)
    saves = saver(folder, cluster)
    dense_file = Path(folder).parent / "dense.pt"
    dense = masters(engine)
    if first > 1:
        engine.put_back(StateReader(newest_complete(Path(folder), cluster).listed.path).fill)
        dense = torch.load(dense_file)
    found = {"fp32": 0.0, "model": 0.0, "exact": True, "moved": 0.0}
    for index in range(first, last + 1):
        found["sums"] = train(engine, cluster, rank, ranks, 1)
        decay = min(DECAY, (1 + index) / (10 + index))
        weights = masters(engine)
        dense = {n: decay * dense[n].double() + (1 - decay) * weights[n].double() for n in weights}
        before = whole_state(engine)
        with engine.evaluating():
            kept, model = masters(engine), whole_weights(engine)
        found["fp32"] = max(
            found["fp32"], *(float((kept[n] - d).abs().max()) for n, d in dense.items())
        )
        found["model"] = max(
            found["model"],
            *(float((model[n] - kept[n].to(engine.module.lm.dtype)).abs().max()) for n in kept),
        )
        found["moved"] = max(float((kept[n] - weights[n]).abs().max()) for n in kept)
        found["exact"] &= whole_state(engine) == before
    if rank == 0:
        torch.save(dense, dense_file)
    saves.save(engine.states(), Position(step=last, report={}))
    saves.close()
    return found


def joined(rank, ranks, cluster, folder, family, file, dtype):
    """The largest difference of the average to the weights in an engine that keeps one from a
    checkpoint without one on.
    """
    engine = make_engine(family, 1, ranks, file, dtype, ema=DECAY)
    engine.put_back(StateReader(newest_complete(Path(folder), cluster).listed.path).fill)
    weights = masters(engine)
    with engine.evaluating():
        kept = masters(engine)
    return max(float((kept[n] - weights[n]).abs().max()) for n in kept)


if __name__ == "__main__":
    main(globals())
