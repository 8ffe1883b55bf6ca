"""What the ranks of the tests of behaviour run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from support.chat_models import probe_of
from support.workers.engines import NO_TERMS, filled, main

from bigmix.cluster.signals import UNWATCHED
from bigmix.evaluation.behaviour.answers import Respondent
from bigmix.evaluation.behaviour.measure import (
    answers_of_base,
    behaviour_line,
    measure_behaviour,
    result_of_base,
)
from bigmix.evaluation.tasks.inference_model import gathered_for_inference
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.torch_kernel import torch_backend
from bigmix.model.causal_lm import build, read_config
from bigmix.model.engine import AdamW, Engine, sharded_construction


def engine_of(path, ranks):
    """A trained model under ZeRO-3."""
    keys = filled(1, ranks)
    model = build(
        read_config(path, None),
        path,
        dtype="fp32",
        attention="sdpa",
        activation_checkpointing=False,
        terms=NO_TERMS,
        options=LossBackendOptions(backend=torch_backend),
        seed=0,
        construction=sharded_construction(keys),
    )
    return Engine(model, keys, AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))


def found_in(result):
    return {
        "line": behaviour_line(result),
        "answer": [pair.answer.text for pair in result.pairs],
        "base": [pair.base.text for pair in result.pairs],
        "lengths": [pair.answer.length for pair in result.pairs],
        "stops": [pair.answer.stops for pair in result.pairs],
        "followed": [pair.followed for pair in result.pairs],
    }


def behaviours(rank, ranks, cluster, folder, batch_rows, modes):
    """The results of the base and of the tuned model, by how the weights are held; the base's
    answers are written where one rank holds whole weights.
    """
    probe = probe_of(folder, batch_rows=batch_rows)
    engines = {name: engine_of(f"{folder}/{name}", ranks) for name in ("base", "tuned")}

    def asked(name, weights, work, activity=UNWATCHED):
        engine = engines[name]
        with (
            engine.evaluating(),
            gathered_for_inference(engine.module.lm, engine.device, cluster, weights) as model,
        ):
            assert model.in_step == (weights == "sharded")
            return work(Respondent(model=model, cluster=cluster, activity=activity))

    found = {}
    for weights in modes:
        base = asked("base", weights, lambda respondent: answers_of_base(respondent, probe))
        again = asked("base", weights, lambda each, base=base: measure_behaviour(each, probe, base))
        tuned = asked(
            "tuned", weights, lambda each, base=base: measure_behaviour(each, probe, base)
        )
        stopped = asked(
            "tuned",
            weights,
            lambda each, base=base: measure_behaviour(each, probe, base),
            replace(UNWATCHED, stop_requested=lambda: rank == ranks - 1),
        )
        found[weights] = {
            "base": found_in(result_of_base(probe, base)),
            "again": found_in(again),
            "tuned": found_in(tuned),
            "fingerprint": base.fingerprint,
            "rest": float(np.exp(base.scores.log_probs_NK1.astype(np.float64)).sum(1).max()),
            "is_stopped": stopped is None,
        }
        if ranks == 1:
            base.write(Path(folder))
    return found


if __name__ == "__main__":
    main(globals())
