"""Trains a recipe: `deepspeed launch/train.py RECIPE.yaml [key=value ...]`.

It runs alike under deepspeed, torchrun, srun and python.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bigmix.commands.rank import main

if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))
