"""What each step did goes in; whether the run must go back to its last checkpoint, and past which
steps, comes out.

Every rank gets the same numbers, so all come to the same end without asking each other.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bigmix.model.engine import Engine
from bigmix.runs.checkpoints import Listed
from bigmix.runs.resume import RollBack
from bigmix.runs.state_file import StateReader

WINDOW = 100  # losses that a new one is held against
_LEAPT = "the loss leapt up"
_FEWEST = 20  # of them, before which nothing is called a spike


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """A step whose loss stands `deviations` standard deviations above the mean of those
    before it.
    """

    step: int
    loss: float
    deviations: float


class Health:
    """Counts steps without a finite gradient in a row, and tells spikes of the loss.

    `skips` in a row ask for a roll-back, None: never. A loss more than `deviations` standard
    deviations above the mean of the last 100 is a spike, which is not added to them, None: none is;
    `spikes_roll_back`: each one asks for it.
    """

    def __init__(
        self, *, skips: int | None, deviations: float | None, spikes_roll_back: bool
    ) -> None:
        self._most_skips = skips
        self._deviations = deviations
        self._spikes_roll_back = spikes_roll_back
        self._back: RollBack | None = None
        self._skipped: list[int] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def is_well(self) -> bool:
        """Whether the last step moved the weights: only then they are worth a checkpoint."""
        return not self._skipped

    def asked(self) -> RollBack | None:
        """The roll-back that what was taken in asks for; asked for once."""
        back, self._back = self._back, None
        return back

    def after(self, step: int, *, skipped: bool) -> None:
        """Take a step in: whether it was skipped since its gradient was not finite."""
        if not skipped:
            self._skipped = []
            return
        self._skipped.append(step)
        if self._most_skips is not None and len(self._skipped) >= self._most_skips:
            steps, self._skipped = tuple(self._skipped), []
            reason = f"{len(steps)} steps in a row had no finite gradient"
            self._back = RollBack(steps=steps, reason=reason)

    def loss(self, step: int, loss: float) -> Spike | None:
        """Take the loss of a step in, in the order of the steps; the spike that it is."""
        if self._deviations is None or not math.isfinite(loss):
            return None
        height = _deviations(loss, self._losses) if len(self._losses) >= _FEWEST else 0.0
        if height <= self._deviations:
            self._losses.append(loss)
            return None
        if self._spikes_roll_back:
            before = self._back.steps if self._back is not None else ()
            self._back = RollBack(steps=(*before, step), reason=_LEAPT)
        return Spike(step=step, loss=loss, deviations=height)

    def state(self) -> list[float]:
        """The losses that the next one is held against."""
        return list(self._losses)

    def resume(self, state: Sequence[float]) -> None:
        """Go on from what `state` gave."""
        self._back, self._skipped = None, []
        self._losses = deque(state, maxlen=WINDOW)


def _deviations(loss: float, before: Sequence[float] | deque[float]) -> float:
    spread = stdev(before)
    above = loss - fmean(before)
    return above / spread if spread else math.inf * above if above > 0 else 0.0


def restore(engine: Engine, listed: Listed) -> None:
    """Put weights and optimizer back, whatever number of ranks wrote them; a collective."""
    engine.put_back(StateReader(listed.path).fill)
