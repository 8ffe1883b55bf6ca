"""An engine goes in, a Hugging Face folder that transformers loads comes out."""

import shutil
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from bigmix.dist import Cluster
from bigmix.engine import Engine


def export(engine: Engine, cluster: Cluster, tokenizer_folder: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer to `folder`, beside first and then in one step; a collective."""
    state = engine.full_state()
    if cluster.world.is_first:
        beside = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(beside, ignore_errors=True)
        lm = engine.module.lm
        lm.config.use_cache = True
        own = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        disable_progress_bar()  # in a log its states run together
        lm.save_pretrained(beside, state_dict=own)
        if tokenizer_folder.is_dir():
            shutil.copytree(tokenizer_folder, beside, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        lm.config.use_cache = False
    cluster.barrier()
