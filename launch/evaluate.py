"""Evaluates a model on a recipe's held-out sources: `deepspeed launch/evaluate.py RECIPE.yaml
[--model FOLDER] [key=value ...]`.

Runs alike under deepspeed, torchrun, srun and python.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bigmix.commands.rank import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
