"""`launch/train.py` with an allocator that returns freed memory at once.

What it kept would otherwise count as memory in use.
"""

import ctypes
import sys

from support.ranks import ROOT

sys.path.insert(0, str(ROOT))

from bigmix.commands.rank import main

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

if __name__ == "__main__":
    for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(threshold, 65536)
    sys.exit(main("train", sys.argv[1:]))
