"""Hashes of documents go in, the news whether each was there before comes out; and which documents are held out."""

import numpy as np
import numpy.typing as npt

FRESH = 1 << 16  # hashes that are kept in a set before they are sorted into an array

Hashes = npt.NDArray[np.bytes_]
Flags = npt.NDArray[np.bool_]


class Seen:
    """All hashes so far, in sorted arrays that double in size: 16 bytes a document, 32 while two arrays are joined."""

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[Hashes] = []

    def add(self, hashes: Hashes) -> Flags:
        """Which of the hashes [D] come here for the first time [D]; of equal ones that is the first."""
        known = np.zeros(len(hashes), np.bool_)
        for array in self._sorted:
            places = np.minimum(array.searchsorted(hashes), len(array) - 1)
            known |= array[places] == hashes
        is_new = ~known
        for index in np.flatnonzero(is_new).tolist():
            key = hashes[index]
            if key in self._fresh:
                is_new[index] = False
            self._fresh.add(key)
        if len(self._fresh) >= FRESH:
            self._sort()
        return is_new

    def _sort(self) -> None:
        array = np.sort(np.array(list(self._fresh), "S16"))
        self._fresh = set()
        while self._sorted and len(self._sorted[-1]) <= len(array):
            array = np.sort(np.concatenate([self._sorted.pop(), array]), kind="stable")
        self._sorted.append(array)


def is_held_out(hashes: Hashes, fraction: float) -> Flags:
    """Which documents are held out [D]: those whose hash lies in the first `fraction` of all hashes."""
    first = np.frombuffer(hashes.tobytes(), ">u8")[::2]
    flags: Flags = first < np.uint64(int(fraction * 2.0**64))
    return flags
