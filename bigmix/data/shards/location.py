"""The addresses of a source's files, from the path that a recipe gives; nothing is read here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from urllib.parse import quote, unquote, urlsplit

from bigmix.errors import BadInput

PIPE = "pipe:"
MANIFEST = "manifest.json"
NAME_HERE = "{}"  # where the name of a file is put in a pipe
WEB = ("http", "https")
LISTED_AT_MOST = 1_000_000  # file names of one brace pattern

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}\s]*,[^{}\s]*)\}")
# The file name inside a command: what is between spaces, quotes and slashes around a brace pattern.
_PIPED_NAME = re.compile(
    r"[^\s/'\"=|;&<>]*(?:\{\d+\.\.\d+\}|\{[^{}\s]*,[^{}\s]*\})[^\s/'\"|;&<>?]*"
)
_SAFE_IN_SHELL = re.compile(r"[A-Za-z0-9._/+@%,:=-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where the files of a source are: `pieces` joined by the name of a file are its address.

    `names` are the shard files that a brace pattern selects, None where all shards of the manifest
    are.
    """

    given: str
    scheme: str
    pieces: tuple[str, ...]
    names: tuple[str, ...] | None

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder of this machine, so that `url` gives plain paths."""
        return self.scheme == ""

    def url(self, name: str) -> str:
        """The address of a file of the source: a path, a URL, or `pipe:` with a whole command."""
        if name.startswith("/") or ".." in name.split("/") or not name:
            raise BadInput(
                f"{shown(self.given)} lists a file {name!r}, allowed are names below its own"
                " folder; prepare the source again"
            )
        if self.scheme == "pipe" and not _SAFE_IN_SHELL.fullmatch(name):
            # Over ssh a second shell reads the command, so that quotes would not protect a name.
            raise BadInput(
                f"{shown(self.given)} lists a file {name!r}, in a pipe allowed are letters, digits"
                " and ._/+@%,:=-; rename the file"
            )
        return (quote(name) if self.scheme in WEB else name).join(self.pieces)


def location_of(path: str) -> Location:
    """The location of a folder, of a `manifest.json`, of a brace pattern of shards, or behind a
    `pipe:`.

    `https://host/d/a-{00..02}.tar?key=1` selects a-00.tar, a-01.tar and a-02.tar of https://host/d;
    each request gets the query. Raises BadInput for a path that cannot be one.
    """
    if path.startswith(PIPE):
        return _piped(path)
    match = _SCHEME.match(path)
    scheme = match.group(1).lower() if match else ""
    if scheme == "file":
        scheme, path = "", unquote(urlsplit(path).path)
    base, query = path, ""
    if scheme in WEB:
        base, _, query = path.partition("?")
    folder, _, last = base.rpartition("/")
    names = None
    if _BRACES.search(last):
        names = tuple(_expanded(last, path))
    elif last != MANIFEST:
        folder = base[:-1] if base.endswith("/") else base
    elif "/" not in base:
        folder = "."
    if _BRACES.search(folder):
        raise BadInput(
            f"{shown(path)} has braces in a folder's name, allowed are braces in the file's; name"
            " each folder as a source of its own"
        )
    before = "" if names and "/" not in base else folder + "/"
    return Location(
        given=path, scheme=scheme, pieces=(before, "?" + query if query else ""), names=names
    )


def _piped(path: str) -> Location:
    command = path.removeprefix(PIPE)
    names = None
    match = None if NAME_HERE in command else _PIPED_NAME.search(command)
    if match is not None:
        names = tuple(_expanded(match.group(), path))
        command = command[: match.start()] + NAME_HERE + command[match.end() :]
    if NAME_HERE not in command:
        raise BadInput(
            f"{path} names no file; write {{}} where the file's name goes, as in `pipe:ssh host cat"
            " /data/{}`"
        )
    first, *rest = command.split(NAME_HERE)
    return Location(given=path, scheme="pipe", pieces=(PIPE + first, *rest), names=names)


def _expanded(pattern: str, path: str) -> Iterator[str]:
    """The names of a brace pattern: `a-{08..10}` gives a-08, a-09, a-10."""
    fixed, choices, at, total = [], [], 0, 1
    for match in _BRACES.finditer(pattern):
        low, high, listed = match.groups()
        if listed is None and int(low) > int(high):
            raise BadInput(
                f"{shown(path)} counts from {low} down to {high}; write {{{high}..{low}}}"
            )
        total *= len(listed.split(",")) if listed is not None else int(high) - int(low) + 1
        if total > LISTED_AT_MOST:
            raise BadInput(
                f"{shown(path)} selects more than {LISTED_AT_MOST:,} files; narrow its range"
            )
        fixed.append(pattern[at : match.start()])
        choices.append(listed.split(",") if listed is not None else _numbers(low, high))
        at = match.end()
    for chosen in product(*choices):
        yield (
            "".join(text for pair in zip(fixed, chosen, strict=True) for text in pair)
            + pattern[at:]
        )


def _numbers(low: str, high: str) -> list[str]:
    # As in bash: a leading zero on either side pads all numbers to one width.
    padded = any(len(text) > 1 and text[0] == "0" for text in (low, high))
    width = max(len(low), len(high)) if padded else 0
    return [str(number).zfill(width) for number in range(int(low), int(high) + 1)]


def scheme_of(url: str) -> str:
    """The scheme of an address: `s3`, `https`, `pipe`, ...; empty for a path of this machine."""
    if url.startswith(PIPE):
        return "pipe"
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else ""


def shown(url: str) -> str:
    """An address as messages and logs show it: without password, and without the query, which may
    hold a signature.
    """
    if scheme_of(url) not in WEB:
        return url
    base, _, query = url.partition("?")
    base = re.sub(r"//[^/@]*@", "//", base)
    return base + ("?..." if query else "")
