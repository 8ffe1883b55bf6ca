"""What a rank imports before a signal finds a handler."""

import subprocess
import sys

from support.ranks import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "numpy", "pydantic", "yaml", "rich"}


def test_nothing_heavy_is_imported_before_the_signal_handlers_are_installed():
    script = "import sys, bigmix.commands.rank; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stdout.split())
