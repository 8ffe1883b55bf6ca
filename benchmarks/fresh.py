"""Runs a task of a script in a fresh interpreter and returns the JSON that it prints last."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def run(
    script: str,
    task: str,
    arguments: Mapping[str, Any],
    *,
    limit_s: float,
    environment: Mapping[str, str],
) -> Result:
    """The result of a task in a fresh interpreter, or {"fault": the reason why there is none}."""
    path = Path(__file__).with_name(script)
    try:
        done = subprocess.run(
            [sys.executable, str(path), task, json.dumps(arguments)],
            capture_output=True,
            text=True,
            timeout=limit_s,
            env=os.environ | environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"fault": f"it did not end within {error.timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and line[0] != " "]
        return {"fault": lines[-1] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def progress(text: str) -> None:
    """Print a line about the progress, apart from the tables, to stderr."""
    print(text, file=sys.stderr, flush=True)
