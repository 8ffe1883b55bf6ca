"""Commands of bigmix in the process of a test: a process of their own would import for longer than
most of them run.
"""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

from bigmix.commands.main import main


def printed(folder: Path, *words: str) -> str:
    """What a command that ends well prints when it is given in a folder."""
    said, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(said):
            assert main(words) == 0, words
    finally:
        os.chdir(before)
    return said.getvalue()
