"""Learning-rate schedules as pure functions of the step.

There is no scheduler object and so no scheduler state to save: step 700 of a resumed run has the learning
rate of step 700 of any other. Three shapes share one warmup:

    cosine    warmup, then half a cosine from 1 down to `min_lr_ratio` (Loshchilov and Hutter, 2017)
    wsd       warmup, stable, decay: down over the last `decay` steps only (Hu et al., MiniCPM, 2024)
    constant  warmup, then 1

`wsd` is the one whose runs can be lengthened: until its decay begins it does not know how long it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mambakit.config import Config, unknown

Shape = Literal["cosine", "wsd", "constant"]
Decay = Literal["linear", "1-sqrt"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """The learning rate over a run, relative to its peak.

    Args:
        name: `cosine`, `wsd` or `constant`.
        warmup: Length of the linear warmup: an integer counts steps, a float in [0, 1] is a share of the run.
        min_lr_ratio: Where cosine and wsd end, relative to the peak, in [0, 1].
        decay: Length of wsd's decay, counted like `warmup`.
        decay_shape: How wsd falls: `linear`, or `1-sqrt` (fast first; Haegele et al., 2024).

    Raises:
        ValueError: A name or a number outside what is said above.
    """

    name: Shape = "cosine"
    warmup: int | float = 0
    min_lr_ratio: float = 0.1
    decay: int | float = 0.2
    decay_shape: Decay = "linear"

    def __post_init__(self) -> None:
        """Refuse names and numbers that mean nothing."""
        if self.name not in get_args(Shape):
            raise ValueError(unknown("schedule", self.name, get_args(Shape)))
        if self.decay_shape not in get_args(Decay):
            raise ValueError(unknown("decay_shape", self.decay_shape, get_args(Decay)))
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}, expected a number in [0, 1]")
        for key, value in (("warmup", self.warmup), ("decay", self.decay)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{key} is {value}, expected steps (an integer) or a share in [0.0, 1.0]")


def factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate of one optimiser step as a share of the peak.

    With w warmup steps, N steps in all, d decay steps and m = `min_lr_ratio`:

        step < w         (step + 1) / w
        cosine           m + (1 - m) (1 + cos(pi p)) / 2,   p = (step - w) / (N - w)
        wsd              1 before N - d, then 1 - (1 - m) p or 1 - (1 - m) sqrt(p),   p = (step - N + d) / d
        constant         1

    Args:
        step: Number of optimiser steps already done, from 0.
        steps: Length of the whole run in optimiser steps.
        config: The shape.

    Returns:
        A number in [0, 1]. Steps past the end keep the last value.
    """
    warmup = _count(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    fall = 1.0 - config.min_lr_ratio
    if config.name == "cosine":
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return config.min_lr_ratio + fall * (1 + math.cos(math.pi * progress)) / 2
    decay = max(_count(config.decay, steps), 1)
    progress = min(max((step - steps + decay) / decay, 0.0), 1.0)
    return 1.0 - fall * (progress if config.decay_shape == "linear" else math.sqrt(progress))


def same_so_far(step: int, one: tuple[int, ScheduleConfig], other: tuple[int, ScheduleConfig]) -> bool:
    """Whether two runs, each (steps, schedule), have had the same learning rates in their first `step` steps.

    This is what decides if an interrupted run may be lengthened or its decay moved: yes, as long as the past
    stays true.
    """
    return one == other or all(factor(s, *one) == factor(s, *other) for s in range(step))


def _count(length: int | float, steps: int) -> int:
    return round(length * steps) if isinstance(length, float) else length
