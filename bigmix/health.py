"""What each step did goes in; whether the run must go back to its last checkpoint, and past which steps, comes out.

Every rank gets the same numbers, so all come to the same end without asking each other.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

WINDOW = 100  # losses that a new one is held against
_FEWEST = 20  # of them, before which nothing is called a spike


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """Go back to the last checkpoint before `steps`, and then train on without them."""

    steps: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """A step whose loss stands `deviations` standard deviations above the mean of those before it."""

    step: int
    loss: float
    deviations: float


class Health:
    """Counts steps without a finite gradient in a row, and tells spikes of the loss.

    `skips` in a row ask for a roll-back, None: never. A loss more than `deviations` standard deviations above the mean
    of the last 100 is a spike, which is not added to them, None: none is; `spikes_roll_back`: each one asks for it.
    """

    def __init__(
        self, *, skips: int | None, deviations: float | None, spikes_roll_back: bool
    ) -> None:
        self._most_skips = skips
        self._deviations = deviations
        self._spikes_roll_back = spikes_roll_back
        self._skipped: list[int] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def is_well(self) -> bool:
        """Whether the last step moved the weights: only then they are worth a checkpoint."""
        return not self._skipped

    def after(self, step: int, *, skipped: bool) -> RollBack | None:
        """Take a step in: whether it was skipped since its gradient was not finite."""
        if not skipped:
            self._skipped = []
            return None
        self._skipped.append(step)
        if self._most_skips is None or len(self._skipped) < self._most_skips:
            return None
        steps, self._skipped = tuple(self._skipped), []
        return RollBack(steps=steps, reason=f"{len(steps)} steps in a row had no finite gradient")

    def spike(self, step: int, loss: float) -> Spike | None:
        """Take the loss of a step in, in the order of the steps; the spike that it is."""
        if self._deviations is None or not math.isfinite(loss):
            return None
        height = _deviations(loss, self._losses) if len(self._losses) >= _FEWEST else 0.0
        if height > self._deviations:
            return Spike(step=step, loss=loss, deviations=height)
        self._losses.append(loss)
        return None

    def back_from(self, spikes: Sequence[Spike]) -> RollBack | None:
        """The roll-back that spikes ask for."""
        if not spikes or not self._spikes_roll_back:
            return None
        return RollBack(
            steps=tuple(spike.step for spike in spikes), reason="the loss leapt up at these steps"
        )

    def state(self) -> list[float]:
        """The losses that the next one is held against."""
        return list(self._losses)

    def resume(self, state: Sequence[float]) -> None:
        """Go on from what `state` gave."""
        self._skipped = []
        self._losses = deque(state, maxlen=WINDOW)


def _deviations(loss: float, before: Sequence[float] | deque[float]) -> float:
    spread = stdev(before)
    above = loss - fmean(before)
    return above / spread if spread else math.inf * above if above > 0 else 0.0
