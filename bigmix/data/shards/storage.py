"""Reads files from disks, the web, S3, Google Cloud Storage, the Hugging Face hub and pipes.

A transfer that breaks off is resumed at the byte that was reached (`retry`), so that every result
here is whole, or an error.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import fs as arrow

from bigmix.data.shards.location import WEB, scheme_of, shown
from bigmix.data.shards.retry import (
    PART_BYTES,
    Ask,
    ByteSpan,
    Opened,
    Opener,
    Retry,
    Transient,
    Watch,
    missing,
    parts_of,
    refused,
)
from bigmix.data.shards.transports import open_http, open_pipe
from bigmix.errors import BadInput, BigmixError

# Words of AWS's responses that no later try will change; pyarrow raises all of them as a plain
# OSError.
_AWS_FINAL = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_SIGNATURE",
    "EXPIRED_TOKEN",
    "UNRECOGNIZED_CLIENT",
    "HTTP status 403",
    "HTTP status 401",
)
_REFUSED = (401, 403)
_YES = ("1", "true", "yes")


def read_file(url: str, *, retry: Retry | None = None, watch: Watch | None = None) -> bytes:
    """A whole file in memory, for small ones such as a manifest.

    Raises BadInput for a file that is missing or may not be read, BigmixError when the tries are
    spent.
    """
    return b"".join(_parts(url, ByteSpan(), retry, watch))


def read_range(
    url: str, start: int, stop: int, *, retry: Retry | None = None, watch: Watch | None = None
) -> bytes:
    """The bytes [start, stop) of a file, fewer where the file ends before `stop`.

    Raises what `read_file` raises.
    """
    return b"".join(_parts(url, ByteSpan(start=start, stop=stop), retry, watch))


def copy_to(
    url: str,
    path: Path,
    *,
    size: int | None,
    retry: Retry | None = None,
    watch: Watch | None = None,
) -> None:
    """Append to `path` what it lacks of a file, in at most 8 MiB of memory; an absent or empty
    `path` gets the whole.

    `size` is the size that the file must have, None where it is not known. Raises OSError where
    writing fails, for instance since the disk is full, and what `read_file` raises.
    """
    with path.open("ab") as file:
        span = ByteSpan(start=file.tell(), size=size)
        for part in _parts(url, span, retry, watch):
            file.write(part)


def _parts(url: str, span: ByteSpan, retry: Retry | None, watch: Watch | None) -> Iterator[bytes]:
    return parts_of(url, span, _opener(url), retry=retry or Retry(), watch=watch or Watch())


def _opener(url: str) -> Opener:
    scheme = scheme_of(url)
    if scheme in WEB:
        return open_http
    known = {
        "": _open_local,
        "file": _open_local,
        "pipe": open_pipe,
        "s3": _open_s3,
        "gs": _open_google,
        "hf": _open_hub,
    }
    return known.get(scheme, _open_other)


def _open_local(url: str, ask: Ask) -> Opened:
    file = io.BufferedReader(io.FileIO(url.removeprefix("file://")))
    file.seek(ask.start)
    return Opened(body=file, size=os.fstat(file.fileno()).st_size)


def _open_s3(url: str, ask: Ask) -> Opened:
    path = _path_of(url)
    with _library(url):
        region = _region_of(path.partition("/")[0])
        system = _s3(os.getpid(), region, ask.timeout_s)
        return _from_arrow(url, system.open_input_file(path), ask)


def _open_google(url: str, ask: Ask) -> Opened:
    with _library(url):
        system = _google(os.getpid(), ask.timeout_s)
        return _from_arrow(url, system.open_input_file(_path_of(url)), ask)


# Made at first use and again in each process: the AWS library's threads do not survive a fork.
@lru_cache
def _s3(process: int, region: str | None, timeout_s: float) -> Any:
    del process
    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in _YES
    return arrow.S3FileSystem(
        anonymous=anonymous,
        region=region,
        # pyarrow does not read these two variables.
        endpoint_override=_environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        request_timeout=timeout_s,
        connect_timeout=timeout_s,
        # One attempt: the tries are ours, so that they are counted and logged.
        retry_strategy=arrow.AwsStandardS3RetryStrategy(max_attempts=1),
    )


@lru_cache
def _google(process: int, timeout_s: float) -> Any:
    del process
    return arrow.GcsFileSystem(retry_time_limit=timedelta(seconds=timeout_s))


@lru_cache
def _region_of(bucket: str) -> str | None:
    given = _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if given or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        return given
    return str(arrow.resolve_s3_region(bucket))


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _from_arrow(url: str, file: Any, ask: Ask) -> Opened:
    file.seek(ask.start)
    metadata = {key.lower(): value for key, value in (file.metadata() or {}).items()}
    tag = metadata.get("etag")
    return Opened(
        body=_Blocks(url, file), size=file.size(), tag=tag.decode() if tag is not None else None
    )


def _open_hub(url: str, ask: Ask) -> Opened:
    with _library(url):
        file = HfFileSystem().open(_path_of(url), "rb", block_size=PART_BYTES)
        file.seek(ask.start)
        return Opened(body=_Blocks(url, file), size=file.size)


def _open_other(url: str, ask: Ask) -> Opened:
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadInput(
            f"{shown(url)} cannot be opened ({error}); allowed are a path, file, s3, gs, hf, http,"
            " https, pipe: and what fsspec knows; install the package that fsspec names, or"
            " correct the path"
        ) from error
    with _library(url):
        file = system.open(path, "rb", block_size=PART_BYTES)
        size = system.info(path).get("size")
        file.seek(ask.start)
        return Opened(body=_Blocks(url, file), size=size, has_known_end=False)


def _path_of(url: str) -> str:
    return url.partition("://")[2]


class _Blocks:
    """A library's file, read in blocks of 8 MiB: each read of it is a request."""

    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file

    def read1(self, most: int, /) -> bytes:
        with _library(self._url):
            return bytes(self._file.read(most))

    def close(self) -> None:
        self._file.close()


@contextmanager
def _library(url: str) -> Iterator[None]:
    """Divide a library's exceptions into those that a later try may change, and the others."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            raise missing(url, _first_line(error)) from error
        if error.response.status_code in _REFUSED:
            raise refused(url, _first_line(error)) from error
        raise Transient(_first_line(error)) from error
    except OSError as error:
        if any(word in str(error) for word in _AWS_FINAL):
            raise refused(url, _first_line(error)) from error
        raise Transient(_first_line(error)) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BigmixError(
            f"{shown(url)} cannot be read: {error}; check the path of its source"
        ) from error
    except Exception as error:
        # Each library of fsspec has its own network errors, and those of httpx are not OSError
        # either.
        raise Transient(f"{type(error).__name__} {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
