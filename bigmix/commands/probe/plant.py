"""Texts and made-up people go in; the texts with documents about the people planted among them come
out, and questions.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.commands.probe.facts import (
    WORLDS,
    FactLanguage,
    FactWorld,
    Person,
    document,
    most_people,
    people,
)
from bigmix.errors import BadInput
from bigmix.files import atomic_write, replace_text
from bigmix.seeding import key_of, permutation
from bigmix.text.formats import Text
from bigmix.text.readers import places_of, raw_documents

TEXT, PLANTED = "text.jsonl.gz", "planted.jsonl.gz"
QUESTIONS, NEW_QUESTIONS, SETTINGS = "questions.jsonl", "questions-new.jsonl", "probe.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Planting:
    """`people` made-up people, each told of in `times` documents."""

    people: int
    times: int
    seed: int
    language: FactLanguage
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """What was written: documents and their characters, of the texts and of those planted; rows
    without a text.
    """

    texts: int
    text_characters: int
    documents: int
    planted_characters: int
    questions: int
    skipped: int


def plant(inputs: Sequence[str], planting: Planting, folder: Path) -> Planted:
    """Write the texts with the planted documents spread evenly among them, these alone, and the
    questions.

    Raises BadInput where the inputs hold no texts, and where more people are asked for than there
    are names.
    """
    world = WORLDS[planting.language]
    _check(planting, world)
    _check_folder(inputs, folder)
    everybody = list(people(world, planting.people, planting.seed))
    planted = _documents(world, everybody, planting)
    num_texts = sum(1 for text in _texts(inputs, planting.columns) if text is not None)
    if not num_texts:
        raise BadInput(f"no text is in {', '.join(inputs)}; give inputs with text")
    folder.mkdir(parents=True, exist_ok=True)
    characters, skipped = _write_texts(inputs, planting, planted, num_texts, folder)
    questions = list(_questions(world, everybody, planting.seed))
    replace_text(folder / QUESTIONS, _lines(planted for planted, _ in questions))
    replace_text(folder / NEW_QUESTIONS, _lines(new for _, new in questions))
    replace_text(folder / SETTINGS, json.dumps(_settings(inputs, planting), indent=2) + "\n")
    return Planted(
        texts=num_texts,
        text_characters=characters,
        documents=len(planted),
        planted_characters=sum(map(len, planted)),
        questions=len(questions),
        skipped=skipped,
    )


def _check(planting: Planting, world: FactWorld) -> None:
    most = most_people(world)
    if planting.people > most:
        raise BadInput(
            f"--people is {planting.people:,} and there are {most:,} names; ask for that many or"
            " fewer"
        )


def _check_folder(inputs: Sequence[str], folder: Path) -> None:
    """What is written must not take the place of what is read."""
    written = {(folder / name).resolve() for name in (TEXT, PLANTED, QUESTIONS, NEW_QUESTIONS)}
    for place in places_of(inputs):
        if Path(place).resolve() in written:
            raise BadInput(
                f"input {place} would be written over; give another --output than {folder}"
            )


def _documents(world: FactWorld, everybody: Sequence[Person], planting: Planting) -> Sequence[str]:
    """All planted documents in the order in which they are planted."""
    order = permutation(len(everybody) * planting.times, key_of(planting.seed, "order"))
    return [
        document(
            world,
            everybody[index % len(everybody)],
            key_of(planting.seed, "document", index),
        )
        for index in order.tolist()
    ]


def _texts(inputs: Sequence[str], columns: Mapping[str, str] | None) -> Iterator[str | None]:
    """The text of each row; None for one that has none."""
    for found in raw_documents(inputs, kind="text", columns=columns):
        yield found.text if isinstance(found, Text) and found.text else None


def _write_texts(
    inputs: Sequence[str],
    planting: Planting,
    planted: Sequence[str],
    num_texts: int,
    folder: Path,
) -> tuple[int, int]:
    """Characters of the texts and rows that had none."""
    characters = skipped = index = done = 0
    with _written(folder / TEXT) as everything, _written(folder / PLANTED) as alone:
        for text in _texts(inputs, planting.columns):
            if text is None:
                skipped += 1
                continue
            # Planted document k stands before text k * texts / documents, rounded down.
            until = -(-(index + 1) * len(planted) // num_texts)
            for each in planted[done:until]:
                everything.write(_line({"text": each, "planted": True}))
                alone.write(_line({"text": each}))
            everything.write(_line({"text": text}))
            done, index, characters = until, index + 1, characters + len(text)
    return characters, skipped


@contextmanager
def _written(path: Path) -> Iterator[gzip.GzipFile]:
    # No name and no time in it: the same texts give the same file.
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
    ):
        yield file


def _questions(
    world: FactWorld, everybody: Sequence[Person], seed: int
) -> Iterator[tuple[Mapping[str, str], Mapping[str, str]]]:
    """For each fact the beginning of a sentence that was planted, and of one that never was."""
    for index, person in enumerate(everybody):
        for attribute in world.attributes:
            chosen = key_of(seed, "question", attribute.name, index) % len(attribute.planted)
            yield (
                _question(attribute.planted[chosen], person, attribute.name),
                _question(attribute.new, person, attribute.name),
            )


def _question(wording: str, person: Person, attribute: str) -> Mapping[str, str]:
    return {
        "prompt": wording.format(name=person.name),
        "response": person.values[attribute],
        "attribute": attribute,
    }


def _settings(inputs: Sequence[str], planting: Planting) -> Mapping[str, Any]:
    return {
        "version": 1,
        "inputs": list(inputs),
        "people": planting.people,
        "times": planting.times,
        "seed": planting.seed,
        "language": planting.language,
        "stop": WORLDS[planting.language].stop,
    }


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(_line(record).decode() for record in records)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
