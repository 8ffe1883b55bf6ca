"""A script, a task and its arguments go in; the JSON that it ends with comes out, from an
interpreter of its own.
"""

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
    """The result of a task in a fresh interpreter, or {"fault": why there is none}."""
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
        return {"fault": f"no end within {error.timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and line[0] != " "]
        return {"fault": lines[-1] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def progress(text: str) -> None:
    """A line of what goes on, apart from the tables."""
    print(text, file=sys.stderr, flush=True)
