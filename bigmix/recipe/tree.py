"""A recipe as nested tables of plain values: its leaves, and how to set one."""

from typing import Any

from bigmix.errors import BadInput

Path_ = tuple[str, ...]  # keys from the top of the tree to a setting


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every value that is not a table, by its dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def put(tree: dict[str, Any], key: Path_, value: Any, source: str) -> None:
    """Set one value; tables on the way are made where there are none.

    Raises BadInput where a value on the way is no table; `source` is where the user gave the
    value.
    """
    for depth, name in enumerate(key[:-1]):
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            inside = ".".join(key[: depth + 1])
            raise BadInput(f"{source}: {inside} is {tree[name]!r} and has no keys")
        tree = tree[name]
    tree[key[-1]] = value
