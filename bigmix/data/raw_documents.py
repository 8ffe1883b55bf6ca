"""Inputs go in, their documents come out as recognised, before any tokenizer has seen them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

from bigmix.errors import BadInput
from bigmix.text.formats import Document, Kind, document_of, recognise
from bigmix.text.readers import ReadOptions, read_rows

_FIRST_ROWS = 256


def raw_documents(
    inputs: Sequence[str],
    *,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Iterator[Document]:
    """The document of each of the first `limit` rows; the first 256 rows decide how they are read.

    Raises BadInput where there is no row, or where no known layout fits them.
    """
    read = islice(read_rows(inputs, ReadOptions()), limit)
    rows = (row.columns for row in read if row.columns is not None)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        raise BadInput(f"no rows are in {', '.join(inputs)}; give inputs with text")
    layout = recognise(first, kind=kind, columns=columns)
    return (document_of(row, layout) for row in chain(first, rows))
