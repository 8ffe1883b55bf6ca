"""The points of a sweep: their names, their settings, and the runs that were chosen."""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from bigmix.errors import BadInput
from bigmix.recipe.models import Recipe
from bigmix.recipe.sections import Sweep
from bigmix.recipe.tree import Path_, leaves, put

NO_POINT = "recipe"  # the name of the one point of a sweep over seeds alone
_OWN = ("seed", "output", "sweep")  # settings that the sweep gives each run
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One choice of settings; `source` is the key of the sweep that has them."""

    name: str
    settings: Mapping[Path_, Any]
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """One run of a sweep; `number` counts all of its runs from 1."""

    number: int
    point: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its folder, seen from the output of the sweep."""
        return f"{self.point}/seed-{self.recipe.seed}"


def points_of(sweep: Sweep) -> Sequence[SweepPoint]:
    """Every combination of the listed values, then the points that have names; raises BadInput with
    every fault.
    """
    axes = leaves(sweep.model_extra or {})
    named = {name: leaves(settings) for name, settings in sweep.points.items()}
    faults = [*_axis_faults(axes), *_own_faults(axes, named)]
    if faults:
        raise BadInput(*faults)
    points = [
        *(_combinations(axes) if axes or not named else ()),
        *(
            SweepPoint(name=n, settings=_by_path(s), source=f"sweep.points.{n}")
            for n, s in named.items()
        ),
    ]
    names = [point.name for point in points]
    repeated = dict.fromkeys(name for name in names if names.count(name) > 1)
    if repeated:
        raise BadInput(
            *(
                f"sweep: {names.count(name)} points have the name {name}; give each value once, and"
                " names of their own to values that read alike, under sweep.points"
                for name in repeated
            )
        )
    return points


def _axis_faults(axes: Mapping[str, Any]) -> Iterator[str]:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            yield (
                f"sweep.{key} is {values!r}, must be a list of values; settings of the sweep itself"
                f" are {', '.join(Sweep.model_fields)}"
            )


def _own_faults(axes: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    keys = [(f"sweep.{key}", key) for key in axes]
    keys += [(f"sweep.points.{n}.{key}", key) for n, settings in named.items() for key in settings]
    for source, key in keys:
        if key.split(".")[0] in _OWN:
            yield (
                f"{source}: {key} is set by the sweep; set sweep.seeds for runs with several"
                " seeds, and the recipe's own output for the folder of all"
            )


def _by_path(settings: Mapping[str, Any]) -> dict[Path_, Any]:
    return {tuple(key.split(".")): value for key, value in settings.items()}


def _combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[SweepPoint]:
    short = _short_names(tuple(axes))
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        parts = sorted(f"{short[key]}-{value_name(value)}" for key, value in chosen.items())
        yield SweepPoint(
            name="_".join(parts) or NO_POINT, settings=_by_path(chosen), source="sweep"
        )


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each key that no other one has; a share is called by its source."""
    ends = {key: _ends(key) for key in keys}
    return {
        key: next(
            (end for end in ends[key] if not any(end in ends[k] for k in keys if k != key)),
            ends[key][-1],
        )
        for key in keys
    }


def _ends(key: str) -> Sequence[str]:
    """From `sources.web.share`: web, web-share, sources-web-share; from `train.lr`: lr,
    train-lr.
    """
    parts = key.split(".")
    ends = ["-".join(parts[at:]) for at in reversed(range(len(parts)))]
    is_share = len(parts) == 3 and parts[0] in ("sources", "groups") and parts[2] == "share"
    return [parts[1], *ends[1:]] if is_share else ends


def value_name(value: Any) -> str:
    """A value as part of a file name: 0.05, 1e-4 however it is written, true, data-web for
    data/web.
    """
    number = _number(value)
    if number is not None:
        return _number_name(number)
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return _UNSAFE.sub("-", text).strip("-") or "empty"


def _number(value: Any) -> float | None:
    """YAML takes 1e-4 for a text, and the recipe takes it for a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number_name(number: float) -> str:
    plain = f"{number:.15f}".rstrip("0").rstrip(".")
    mantissa, _, exponent = f"{number:.14e}".partition("e")
    scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    is_small = 0 < abs(number) < 1
    return scientific if is_small and len(scientific) < len(plain) else plain


def tree_of(
    recipe: Mapping[str, Any], point: SweepPoint, *, seed: int, output: str
) -> dict[str, Any]:
    """The recipe of one run of a point, as plain tables; a source whose share is 0 is evaluated
    only.
    """
    tree = copy.deepcopy(dict(recipe))
    tree.pop("sweep", None)
    for key, value in point.settings.items():
        put(tree, key, copy.deepcopy(value), point.source)
    _read_shares(tree)
    _scale_others(tree, point)
    for name in [key[1] for key in point.settings if key[0] == "sources" and _is_share(key)]:
        if tree["sources"][name]["share"] == 0:
            _leave_out(tree, name)
    return tree | {"seed": seed, "output": f"{output}/{point.name}/seed-{seed}"}


def _read_shares(tree: dict[str, Any]) -> None:
    """Shares that YAML takes for texts, such as 2e-2, as the numbers that the recipe takes them
    for.
    """
    for table in ("sources", "groups"):
        for member in (tree.get(table) or {}).values():
            number = _number(member.get("share")) if isinstance(member, dict) else None
            if number is not None:
                member["share"] = number


def _scale_others(tree: dict[str, Any], point: SweepPoint) -> None:
    """A swept share is the very fraction of the rows: the others divide the rest in the ratio that
    the recipe gives.

    Left alone where a share next to it is no number, or where the swept ones leave nothing.
    """
    members = [(t, n, m) for t in ("sources", "groups") for n, m in (tree.get(t) or {}).items()]
    swept = {key[:2] for key in point.settings if _is_share(key)}
    for level in {m.get("group") for t, n, m in members if (t, n) in swept}:
        neighbours = {(t, n): m for t, n, m in members if m.get("group") == level}
        shares = [m.get("share") for m in neighbours.values()]
        fixed = [key for key in neighbours if key not in swept]
        if not fixed or not all(_is_fraction(share) for share in shares):
            continue
        left = 1 - sum(neighbours[key]["share"] for key in neighbours if key in swept)
        total = sum(neighbours[key]["share"] for key in fixed)
        if left > 0 and total > 0:
            for key in fixed:
                # Fractions with few digits keep the mixture's cycle short; a source's share stays
                # exact to 1e-12.
                neighbours[key]["share"] = round(neighbours[key]["share"] / total * left, 12)


def _is_share(key: Path_) -> bool:
    return len(key) == 3 and key[0] in ("sources", "groups") and key[2] == "share"


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _leave_out(tree: dict[str, Any], name: str) -> None:
    """Train without a source and with all else that follows: it has no reference, and no group of
    its own.
    """
    source = tree["sources"][name]
    if "path" not in source:
        return  # no source of the recipe: its check says so
    del tree["sources"][name]
    if source.get("held_out") is not None:
        packed = {k: source[k] for k in ("long_documents", "whole_below") if k in source}
        held_out = {"path": source["held_out"], **packed} if packed else source["held_out"]
        tree["held_out"] = {**(tree.get("held_out") or {}), name: held_out}
    anchored = (tree.get("reference") or {}).get("sources", {})
    if anchored.pop(name, None) is not None and not anchored:
        del tree["reference"]
    _drop_empty_groups(tree, source.get("group"))


def _drop_empty_groups(tree: dict[str, Any], group: str | None) -> None:
    groups = tree.get("groups") or {}
    members = [*tree["sources"].values(), *groups.values()]
    if group in groups and all(member.get("group") != group for member in members):
        _drop_empty_groups(tree, groups.pop(group).get("group"))


def chosen(runs: Sequence[SweepRun], sweep: Sweep) -> Sequence[SweepRun]:
    """Those of the runs that `only` and `part` leave; raises BadInput where `only` has what there
    is not.
    """
    faults = [
        f"sweep.only has {one}, which is no run or point of this sweep; its {len(runs)} runs are"
        f" numbered from 1 and named like {runs[0].name}: `bigmix sweep` lists them"
        for one in sweep.only
        if not any(_is_meant(run, one) for run in runs)
    ]
    place, of = map(int, sweep.part.split("/")) if sweep.part is not None else (1, 1)
    if place > of:
        faults.append(f"sweep.part is {sweep.part}, must be I/N with I from 1 to N")
    if faults:
        raise BadInput(*faults)
    taken = [
        run for run in runs if not sweep.only or any(_is_meant(run, one) for one in sweep.only)
    ]
    return taken[place - 1 :: of]


def _is_meant(run: SweepRun, one: int | str) -> bool:
    return one in (run.number, str(run.number), run.point, run.name)
