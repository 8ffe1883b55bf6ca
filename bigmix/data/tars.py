"""The bytes of a WebDataset tar go in, its samples come out as rows; an archive that is cut short is an error."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from bigmix.errors import BadInput

CHUNK = 1 << 20
TAR_BLOCK = 512


def read_tar(place: str, stream: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    """The samples of a tar: neighbouring members with one key, .txt as `text` and .json as columns."""
    key, columns = None, dict[str, Any]()
    # The tar is read through a file that can seek; only then does tarfile check what it skips.
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    for member in _members(place, source):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if key is not None and key != (folder, stem):
            yield columns
            columns = {}
        key = (folder, stem)
        columns |= _member_columns(place, member.name, suffix, member.content)
    if key is not None:
        yield columns


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    name: str
    content: bytes


def _members(place: str, source: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=source, mode="r:") as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isfile() else None
            if content is not None:
                yield _Member(name=info.name, content=content.read())
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        # tarfile takes a cut or damaged header for the end of the archive.
        source.seek(tar.offset)
        if source.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise BadInput(
                f"{place} is cut short: no header and no end of archive at byte {tar.offset}; "
                "fetch or write the file again"
            )
        # Reading on to the end also makes a compressed file check its own checksum.
        while rest := source.read(CHUNK):
            if rest.count(0) != len(rest):
                raise BadInput(
                    f"{place} goes on behind the end of its archive at byte {tar.offset}; tars that were joined with "
                    "cat are read only when they are files of their own"
                )


def _member_columns(place: str, name: str, suffix: str, content: bytes) -> Mapping[str, Any]:
    try:
        if suffix == "txt":
            return {"text": content.decode("utf-8-sig")}
        if suffix == "json":
            value = json.loads(content.decode("utf-8-sig"))
            return value if isinstance(value, dict) else {}
    except ValueError as error:
        raise BadInput(
            f"{place}, member {name}: not {suffix} in UTF-8 ({error}); mend it"
        ) from error
    return {}
