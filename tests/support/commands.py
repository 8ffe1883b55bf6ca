"""Runs commands of bigmix in the process of a test.

A process of their own would spend longer on imports than most of them take to run.
"""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

from bigmix.commands.main import main


def printed(folder: Path, *arguments: str) -> str:
    """What a command prints when it is run in a folder; it must succeed."""
    output, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(output):
            assert main(arguments) == 0, arguments
    finally:
        os.chdir(before)
    return output.getvalue()
