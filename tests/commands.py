"""Commands of bigmix in the process of a test: a process of their own would import for longer than most of them run."""

import io
from contextlib import chdir, redirect_stdout
from pathlib import Path

from bigmix.cli import main


def printed(folder: Path, *words: str) -> str:
    """What a command that ends well prints when it is given in a folder."""
    said = io.StringIO()
    with chdir(folder), redirect_stdout(said):
        assert main(words) == 0, words
    return said.getvalue()
