"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """Warm-up, then a shape, down to `final` times the peak one step after the last.

    `at(step)` is for steps 1 .. `steps`; the first step of a warm-up of w steps has peak / w.
    cosine follows Loshchilov and Hutter, "SGDR", 2016; wsd (warm-up, stable, decay) follows Hu et
    al., "MiniCPM", 2024.
    """

    peak: float
    steps: int
    warmup_steps: int
    shape: Literal["cosine", "linear", "wsd", "constant"]
    decay: float
    final: float

    def at(self, step: float) -> float:
        """The learning rate of optimizer step `step`, counted from 1; between steps, where the
        run's length has changed.
        """
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return self.peak * (self.final + (1 - self.final) * self._height(step))

    def _height(self, step: float) -> float:
        """1 at the end of the warm-up, 0 one step after the last, so that no step is without
        effect.
        """
        if self.shape == "constant":
            return 1.0
        decay_from = self.warmup_steps
        if self.shape == "wsd":
            decay_from = max(decay_from, self.steps - math.ceil(self.decay * self.steps))
        if step <= decay_from or decay_from >= self.steps:
            return 1.0
        done = min(1.0, (step - decay_from) / (self.steps + 1 - decay_from))
        return (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done


def warmup_steps(warmup: float, steps: int) -> int:
    """A warm-up below 1 is a fraction of the steps, else a number of steps."""
    return round(warmup * steps) if warmup < 1 else int(warmup)
