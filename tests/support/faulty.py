"""`launch/train.py` with a fault in some steps of one rank.

    python faulty.py '{"nan": {"rank": 1, "steps": [5]}}' RECIPE.yaml ...

nan: the loss of the last micro-batch is not finite
spike: the loss of the last micro-batch is 30 times as large
"""

import json
import os
import sys

from support.ranks import ROOT

sys.path.insert(0, str(ROOT))

from bigmix.commands.rank import main
from bigmix.model import engine
from bigmix.train import step


def with_fault(kind, rank, steps):
    run, forward, at = step.run, engine.Engine.forward, {}

    def watched_run(the_engine, cluster, ready, *given):
        at["step"], at["left"] = ready.batch.step, len(ready.micro_batches)
        return run(the_engine, cluster, ready, *given)

    def faulty_forward(self, batch):
        value, sums = forward(self, batch)
        at["left"] = at.get("left", 0) - 1
        is_here = at.get("step") in steps and int(os.environ["RANK"]) == rank and not at["left"]
        if not is_here:
            return value, sums
        return (value * float("nan"), sums) if kind == "nan" else (value * 30, sums * 30)

    step.run, engine.Engine.forward = watched_run, faulty_forward


if __name__ == "__main__":
    for name, fault in json.loads(sys.argv[1]).items():
        with_fault(name, **fault)
    sys.exit(main("train", sys.argv[2:]))
