"""Shares of sources: from what a recipe says to the whole weight of every source in every step.

A share is a number, points [step, share], or follows from the sizes of sources: by a temperature,
or as even as epochs allow. Sources may be members of groups, whose share they divide in the ratio
of their own; from a step on a source may have ended. Shares are normalised among the members of
each group.

Letters: K steps, S sources.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor, gcd, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from bigmix.recipe import Group, Recipe, Source
from bigmix.recipe.shares import Controller, Temperature, UniMax
from bigmix.types import Floats

Points = Sequence[tuple[int, float]]
ShareValue = float | Points
# Shares that change are kept to one part in a million; constant ones are exact.
UNITS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareMember:
    """A source's or a group's share of the group it is in, or of the whole where `group` is
    None.
    """

    share: ShareValue
    group: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareWeights:
    """Whole weights by piece: from step `first_steps[j]` on, source s has `weights[j][s]` of
    `unit`.
    """

    first_steps: Sequence[int]
    weights: Sequence[Sequence[int]]
    unit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """The shares of all sources; `ends` has the step from which on a source is left out."""

    sources: Mapping[str, ShareMember]
    groups: Mapping[str, ShareMember] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in their order."""
        return tuple(self.sources)

    @property
    def last_change(self) -> int:
        """The step from which on the shares are constant."""
        members = (*self.sources.values(), *self.groups.values())
        points = [m.share[-1][0] for m in members if not isinstance(m.share, int | float)]
        return max([0, *points, *self.ends.values()])

    def later(self, steps: int) -> "Shares":
        """The same shares, counted from `steps` steps later."""
        sources, groups = (
            {
                name: replace(member, share=_later(member.share, steps))
                for name, member in members.items()
            }
            for members in (self.sources, self.groups)
        )
        ends = {name: max(0, end - steps) for name, end in self.ends.items()}
        return Shares(sources=sources, groups=groups, ends=ends)

    def at(self, step: int) -> dict[str, float]:
        """The normalised share of each source in the step after the first `step` ones; all 0 where
        no source is left.
        """
        table = self.table(np.array([step]))
        return {name: float(table[name][0]) for name in self.sources}

    def table(self, steps: npt.NDArray[np.int64]) -> dict[str, Floats]:
        """The normalised share of each source at each of the steps."""
        values = {name: _values(member.share, steps) for name, member in self.sources.items()}
        for name, end in self.ends.items():
            values[name] = np.where(steps < end, values[name], 0.0)
        return self._divided(values, steps)

    def exact(self) -> dict[str, Fraction] | None:
        """The shares as fractions; None where one of them changes during the run."""
        members = (*self.sources.values(), *self.groups.values())
        if self.ends or not all(isinstance(m.share, int | float) for m in members):
            return None
        whole = {name: Fraction(str(m.share)) for name, m in self.sources.items()}
        parts = {name: Fraction(str(m.share)) for name, m in self.groups.items()}
        return {name: self._fraction(name, whole, parts) for name in self.sources}

    def weights(self) -> ShareWeights:
        """The shares as whole weights, exact where they are constant."""
        exact = self.exact()
        if exact is not None:
            constant = whole_weights(list(exact.values()))
            return ShareWeights(first_steps=[0], weights=[constant], unit=sum(constant))
        steps = np.arange(self.last_change + 1)
        table = self.table(steps)
        units_KS = _whole_units(np.stack([table[name] for name in self.sources], axis=1))
        changes = np.flatnonzero((np.diff(units_KS, axis=0) != 0).any(axis=1)) + 1
        first = np.concatenate([[0], changes])
        return ShareWeights(
            first_steps=first.tolist(), weights=units_KS[first].tolist(), unit=UNITS
        )

    def _divided(
        self, values: Mapping[str, Floats], steps: npt.NDArray[np.int64]
    ) -> dict[str, Floats]:
        """The normalised shares from raw ones, beginning with the members of the innermost
        groups.
        """
        raw = {name: _values(group.share, steps) for name, group in self.groups.items()}
        nothing = np.zeros(len(steps))
        for name in sorted(self.groups, key=self._depth, reverse=True):
            inside = sum((values[n] for n in self._sources_of(name)), nothing)
            inside = sum((raw[n] for n in self._groups_of(name)), inside)
            raw[name] = np.where(inside > 0, raw[name], 0.0)
        shares = {}
        for name, member in self.sources.items():
            share, level = values[name], member.group
            while True:
                total = sum((values[n] for n in self._sources_of(level)), nothing)
                total = sum((raw[n] for n in self._groups_of(level)), total)
                share = np.divide(share, total, out=np.zeros(len(steps)), where=total > 0)
                if level is None:
                    break
                share, level = share * raw[level], self.groups[level].group
            shares[name] = share
        return shares

    def _fraction(
        self, name: str, sources: Mapping[str, Fraction], groups: Mapping[str, Fraction]
    ) -> Fraction:
        share, level = sources[name], self.sources[name].group
        while True:
            total = sum((sources[n] for n in self._sources_of(level)), Fraction(0))
            total += sum((groups[n] for n in self._groups_of(level)), Fraction(0))
            share /= total
            if level is None:
                return share
            share, level = share * groups[level], self.groups[level].group

    def _sources_of(self, group: str | None) -> list[str]:
        return [name for name, member in self.sources.items() if member.group == group]

    def _groups_of(self, group: str | None) -> list[str]:
        """The groups inside a group, without those that have no source anywhere inside."""
        return [
            name
            for name, member in self.groups.items()
            if member.group == group and self._has_sources(name)
        ]

    def _has_sources(self, group: str) -> bool:
        inner = [name for name, member in self.groups.items() if member.group == group]
        return bool(self._sources_of(group)) or any(map(self._has_sources, inner))

    def _depth(self, group: str) -> int:
        outer = self.groups[group].group
        return 0 if outer is None else 1 + self._depth(outer)


def shares_of(shares: Mapping[str, ShareValue]) -> Shares:
    """Shares without groups."""
    return Shares(sources={name: ShareMember(share=share) for name, share in shares.items()})


def recipe_shares(
    recipe: Recipe, sizes: Mapping[str, float], decided: Mapping[str, float]
) -> Shares:
    """The shares of rows of a recipe.

    `sizes` are the shares that follow from the sizes of sources, `decided` those that controllers
    have decided; a controlled share that is not among them is at its start.
    """
    return _of_members(recipe, sizes, decided, lambda member: member.share)


def recipe_loss_shares(
    recipe: Recipe, sizes: Mapping[str, float], decided: Mapping[str, float]
) -> Shares:
    """The same for the shares of the gradient: those of rows where the recipe gives no others."""
    return _of_members(recipe, sizes, decided, lambda member: member.loss_share or member.share)


def _of_members(
    recipe: Recipe,
    sizes: Mapping[str, float],
    decided: Mapping[str, float],
    share_of: Callable[[Source | Group], Any],
) -> Shares:
    now = {n: decided.get(n, c.start) for n, c in recipe.controllers.items()}
    values = {**sizes, **now}
    sources = {
        name: ShareMember(share=_number(share_of(source), values.get(name)), group=source.group)
        for name, source in recipe.sources.items()
    }
    groups = {
        name: ShareMember(share=_number(share_of(group), values.get(name)), group=group.group)
        for name, group in recipe.groups.items()
    }
    members: dict[str, Source | Group] = {**recipe.sources, **recipe.groups}
    controlled = [n for n in now if isinstance(share_of(members[n]), Controller)]
    return _with_the_rest(Shares(sources=sources, groups=groups), controlled)


def _number(
    share: float | Points | Temperature | UniMax | Controller, value: float | None
) -> ShareValue:
    if isinstance(share, Temperature | UniMax | Controller):
        assert value is not None
        return value
    return share


def _with_the_rest(shares: Shares, controlled: Collection[str]) -> Shares:
    """The same shares, where controlled ones are fractions of all: the other members of their group
    become a group of their own, which has the rest.
    """
    members = {**shares.sources, **shares.groups}
    for level in {members[name].group for name in controlled}:
        fractions = [members[n].share for n in controlled if members[n].group == level]
        # A name in a recipe has no blank, so that this one is free.
        rest = f"the rest of {level}"
        inside = {
            name: replace(member, group=rest)
            for name, member in members.items()
            if member.group == level and name not in controlled
        }
        left = 1 - sum(Fraction(str(fraction)) for fraction in fractions)
        members |= {**inside, rest: ShareMember(share=float(left), group=level)}
    return Shares(
        sources={name: members[name] for name in shares.sources},
        groups={name: member for name, member in members.items() if name not in shares.sources},
    )


def apportion(due: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`: the largest remainders get what rounding down leaves, so
    that each number is within one of its due.

    Where a name is due less than 0 it gets 0, and the others get less in its place.
    """
    whole = {name: max(0, floor(value)) for name, value in due.items()}
    order = sorted(whole, key=lambda name: whole[name] - due[name])
    left = total - sum(whole.values())
    for name in order[:left] if left > 0 else ():
        whole[name] += 1
    # A source that was given too much before can be due less than 0. The others then get less, the
    # one that is furthest above its due first.
    for _ in range(-left):
        most = max(
            (name for name in order if whole[name]), key=lambda name: whole[name] - due[name]
        )
        whole[most] -= 1
    return whole


def whole_weights(shares: Sequence[float | Fraction]) -> list[int]:
    """Shares as the smallest whole numbers in the same ratio: 0.57 and 0.43 become 57 and 43."""
    exact = [Fraction(str(share)) for share in shares]
    scale = lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    common = gcd(*whole)
    return [weight // common for weight in whole]


def _values(share: ShareValue, steps: npt.NDArray[np.int64]) -> Floats:
    if isinstance(share, int | float):
        return np.full(len(steps), float(share))
    at, values = zip(*share, strict=True)
    between: Floats = np.interp(steps, at, values)
    return between


def _later(share: ShareValue, steps: int) -> ShareValue:
    if isinstance(share, int | float):
        return share
    now = float(_values(share, np.array([steps]))[0])
    return [(0, now), *((step - steps, value) for step, value in share if step > steps)]


def _whole_units(shares_KS: Floats) -> npt.NDArray[np.int64]:
    """The shares of each step in whole units that sum to UNITS: the largest remainders get what
    rounding down leaves.
    """
    raw = shares_KS * UNITS
    units = np.floor(raw + 1e-6).astype(np.int64)
    left = UNITS - units.sum(axis=1)
    rank = np.argsort(np.argsort(units - raw, axis=1, kind="stable"), axis=1, kind="stable")
    whole: npt.NDArray[np.int64] = units + (rank < left[:, None])
    return whole


SIZE_DIGITS = 6  # shares by a temperature are kept to one part in a million


def by_temperature(recipe: Recipe, tokens: Mapping[str, int]) -> dict[str, float]:
    """The shares of sources with a temperature: their tokens to its power, as parts of the
    group.
    """
    found: dict[str, float] = {}
    for level in {source.group for source in recipe.sources.values()}:
        powers = {
            name: source.share.temperature
            for name, source in recipe.sources.items()
            if isinstance(source.share, Temperature) and source.group == level
        }
        largest = max((tokens[name] for name in powers), default=1)
        sizes = {name: (tokens[name] / largest) ** power for name, power in powers.items()}
        total, least = sum(sizes.values()), 10.0**-SIZE_DIGITS
        found |= {name: max(round(n / total, SIZE_DIGITS), least) for name, n in sizes.items()}
    return found


def levels_of_unimax(recipe: Recipe) -> Iterator[dict[str, float]]:
    """For each group the sources that divide rows by UniMax, with the most epochs of each."""
    for level in dict.fromkeys(source.group for source in recipe.sources.values()):
        epochs = {
            name: source.share.unimax
            for name, source in recipe.sources.items()
            if isinstance(source.share, UniMax) and source.group == level
        }
        if epochs:
            yield epochs


def unimax(capacities: Mapping[str, int], num_rows: int) -> dict[str, int]:
    """Divide `num_rows` rows evenly among sources, each of which gives at most its capacity.

    A source with less capacity than its even part gives all, and the others divide what is left.
    The sum is less than `num_rows` where the capacities are. Chung et al., "UniMax: Fairer and more
    effective language sampling", 2023, algorithm 1, in whole rows.
    """
    given: dict[str, int] = {}
    for name in sorted(capacities, key=lambda name: (capacities[name], name)):
        even = (num_rows - sum(given.values())) // (len(capacities) - len(given))
        given[name] = min(capacities[name], even)
    return {name: given[name] for name in capacities}
