"""Reads a recipe from YAML and overrides, and reports all of its faults at once."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bigmix.errors import BadInput
from bigmix.recipe.marks import tables_in
from bigmix.recipe.models import Recipe
from bigmix.recipe.moved import MOVED, with_moved_keys
from bigmix.recipe.sweep import SweepPoint, SweepRun, chosen, points_of, tree_of
from bigmix.recipe.tree import Path_, leaves, put

_MOST_NAMED = 3  # points that a fault names


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A recipe; of a sweep also its runs, all of them and those that `only` and `part` choose."""

    recipe: Recipe
    runs: Sequence[SweepRun] = ()
    chosen: Sequence[SweepRun] = ()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of one run; `overrides` are written `train.lr=1e-5` and win over the file.

    Raises BadInput with every fault, each with its line and key, or where a sweep leaves the choice
    between its runs.
    """
    loaded = load(str(path), overrides)
    if loaded.recipe.sweep is None:
        return loaded.recipe
    if len(loaded.chosen) != 1:
        raise BadInput(
            f"recipe {path} is a sweep with {len(loaded.chosen)} runs, and this takes one of them;"
            f" add its number or name, such as sweep.only={loaded.runs[0].name}: `bigmix sweep"
            f" {path}` lists them"
        )
    return loaded.chosen[0].recipe


def load(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe, and where it is a sweep the recipe of each run; raises BadInput with every
    fault of all of them.
    """
    tree, lines = _read_yaml(path)
    for override in overrides:
        key, value = _parse_override(override)
        put(tree, key, value, f"override {'.'.join(key)}")
        lines[key] = f"override {override}"
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise BadInput(*_messages(error, lines, path)) from error
    if recipe.sweep is None:
        return Loaded(recipe=recipe)
    runs = _runs(recipe, points_of(recipe.sweep), tree, lines, path)
    return Loaded(recipe=recipe, runs=runs, chosen=chosen(runs, recipe.sweep))


def _runs(
    recipe: Recipe, points: Sequence[SweepPoint], tree: Any, lines: Mapping[Path_, str], path: str
) -> Sequence[SweepRun]:
    """Seed by seed, so that one run of every point is done as early as can be."""
    assert recipe.sweep is not None
    runs: list[SweepRun] = []
    faults: dict[str, list[str]] = {}
    for seed in range(recipe.seed, recipe.seed + recipe.sweep.seeds):
        for point in points:
            try:
                own = Recipe.model_validate(tree_of(tree, point, seed=seed, output=recipe.output))
            except ValidationError as error:
                found: Sequence[str] = tuple(_messages(error, _lines_of(point, lines), path))
            except BadInput as error:
                found = error.faults
            else:
                runs.append(SweepRun(number=len(runs) + 1, point=point.name, recipe=own))
                continue
            for fault in found:
                faults.setdefault(fault, []).append(point.name)
        if faults:
            raise BadInput(
                *(_of_points(fault, names, len(points)) for fault, names in faults.items())
            )
    return runs


def _lines_of(point: SweepPoint, lines: Mapping[Path_, str]) -> dict[Path_, str]:
    """The lines of the settings of a point: in the sweep, and in the recipe for those that it does
    not change.
    """
    within = tuple(point.source.split(".", 2))
    lines_of_sweep = {
        tuple(".".join(key[len(within) :]).split(".")): place
        for key, place in lines.items()
        if key[: len(within)] == within
    }
    return dict(lines) | {
        key: place for key, place in lines_of_sweep.items() if key in point.settings
    }


def _of_points(fault: str, names: Sequence[str], num_points: int) -> str:
    """A fault with the points that have it, unless all do."""
    if len(names) == num_points > 1:
        return fault
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"point {', '.join(names[:_MOST_NAMED])}{more}: {fault}"


def from_plain(tree: Mapping[str, Any], place: str) -> Recipe:
    """The recipe that `plain` gave the values of, with today's defaults for settings that are
    newer.

    Raises BadInput where it has settings that this release does not know; `place` says where it is
    from.
    """
    try:
        return Recipe.model_validate(with_moved_keys(tree))
    except ValidationError as error:
        raise BadInput(*_messages(error, {}, place)) from error


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe with all its defaults as plain values."""
    return recipe.model_dump(mode="json")


def to_yaml(recipe: Recipe) -> str:
    """The recipe with all its defaults, as YAML that `load_recipe` reads back equal."""
    tree = plain(recipe)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def differences(old: Recipe, new: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that is not the same in both: its dotted key, the old value and the new one."""
    before, after = leaves(plain(old)), leaves(plain(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[Path_, str]]:
    """The tree of a YAML file, and the line of each of its keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"recipe {path} cannot be read ({reason}); give the path of a YAML file"
        ) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise BadInput(f"recipe {path} holds no settings; see docs/recipe.md for the keys")
    lines: dict[Path_, str] = {}
    repeated = list(_walk(node, (), lines, path))
    if repeated:
        raise BadInput(*repeated)
    return tree, lines


def _walk(
    node: yaml.MappingNode, prefix: Path_, lines: dict[Path_, str], path: str
) -> Iterator[str]:
    """Fill `lines`; yields a message for each key that a mapping holds twice."""
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        place = f"{path}:{key_node.start_mark.line + 1}"
        if key in lines:
            yield (
                f"{place}: {'.'.join(key)} is here a second time (first at {lines[key]}); delete"
                " one of the two"
            )
        lines[key] = place
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, key, lines, path)


def _parse_override(override: str) -> tuple[Path_, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise BadInput(
            f"override {override!r} is not KEY=VALUE; write it like train.lr=1e-5, without spaces"
        )
    try:
        return tuple(key.strip().split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BadInput(f"override {override!r}: the value is not YAML: {error}") from error


def _messages(error: ValidationError, lines: Mapping[Path_, str], path: str) -> Iterator[str]:
    seen = set()
    for fault in error.errors():
        key = tuple(part for part in map(str, fault["loc"]) if not _is_type_tag(part))
        for text in _text(fault, key).splitlines():
            message = f"{_place(key, lines, path)}: {text}"
            if message not in seen:
                seen.add(message)
                yield message


def _is_type_tag(part: str) -> bool:
    """pydantic names the member of a union that it tried, which means nothing to a user."""
    return part == "[key]" or part.startswith(("<", "tuple[", "constrained-", "function-"))


def _place(key: Path_, lines: Mapping[Path_, str], path: str) -> str:
    for end in range(len(key), 0, -1):
        if key[:end] in lines:
            return lines[key[:end]]
    return path


def _text(fault: Any, key: Path_) -> str:
    name = ".".join(key)
    value = fault["input"]
    if fault["type"] == "extra_forbidden":
        return _unknown(key)
    if fault["type"] == "union_tag_invalid":
        allowed = "a number or points [step, value]"
        allowed += ", or have a controller" if key[0] == "groups" and key[-1] == "share" else ""
        return f"{name} is a table, must be {allowed}; see docs/recipe.md"
    if fault["type"] == "missing":
        return f"{name} is missing; add it, docs/recipe.md says what it means"
    if fault["type"] == "value_error":
        reason = str(fault["ctx"]["error"])
        return f"{name}: {reason}" if name else reason
    if (
        key[0] in ("sources", "groups")
        and key[-1] in ("share", "loss_share")
        and _is_at_most_0(value)
    ):
        return (
            f"{name} is {value}, must be above 0; to leave {key[1]} out, delete it from the"
            f" {key[0]}"
        )
    allowed = fault["msg"][0].lower() + fault["msg"][1:]
    shown = "a table" if isinstance(value, dict) else repr(value)
    return f"{name} is {shown}: {allowed.replace('input ', 'it ')}; see docs/recipe.md"


def _is_at_most_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= 0


def _unknown(key: Path_) -> str:
    moved = MOVED.get(".".join(key))
    if moved is not None:
        return f"{'.'.join(key)} is {moved.key} now; write {moved.example}"
    known = list(_fields_at(key[:-1]))
    near = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{'.'.join(key)} is not a setting; {hint}"


def _fields_at(prefix: Path_) -> Sequence[str]:
    """Names of the settings in the table at `prefix`; the keys of a dict of tables are anything."""
    tables: list[type[BaseModel]] = [Recipe]
    for name in prefix:
        fields = [table.model_fields[name] for table in tables if name in table.model_fields]
        if fields:
            tables = [table for field in fields for table in tables_in(field.annotation)]
    return tuple(name for table in tables for name in table.model_fields)
