"""Evaluates a model on the held-out sources of a recipe.

`deepspeed launch/evaluate.py RECIPE.yaml [--model FOLDER] [key=value ...]` runs alike under
deepspeed, torchrun, srun and python.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bigmix.commands.rank import main

if __name__ == "__main__":
    sys.exit(main("evaluate", sys.argv[1:]))
