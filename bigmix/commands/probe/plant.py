"""Plants documents about made-up people among texts, and writes questions about their facts."""

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
    """What to plant: `num_people` made-up people, with `times` documents about each.

    `columns` maps the parts of a text to the columns of the inputs, as in `bigmix prepare`.
    """

    num_people: int
    times: int
    seed: int
    language: FactLanguage
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """What was written: the texts and the planted documents with their characters, the questions,
    and the records that were skipped since they have no text.
    """

    num_texts: int
    num_text_characters: int
    num_planted: int
    num_planted_characters: int
    num_questions: int
    num_skipped: int


def plant(inputs: Sequence[str], planting: Planting, folder: Path) -> Planted:
    """Write the texts with the planted documents spread evenly among them, the planted documents
    alone, and the questions.

    Raises BadInput where the inputs have no text or would be overwritten, and where there are more
    people than names.
    """
    world = WORLDS[planting.language]
    _check(planting, world)
    _check_folder(inputs, folder)
    persons = list(people(world, planting.num_people, planting.seed))
    planted = _documents(world, persons, planting)
    num_texts = sum(1 for text in _texts(inputs, planting.columns) if text is not None)
    if not num_texts:
        raise BadInput(f"no text is in {', '.join(inputs)}; give inputs with text")
    folder.mkdir(parents=True, exist_ok=True)
    num_characters, num_skipped = _write_texts(inputs, planting, planted, num_texts, folder)
    questions = list(_questions(world, persons, planting.seed))
    replace_text(folder / QUESTIONS, _lines(planted for planted, _ in questions))
    replace_text(folder / NEW_QUESTIONS, _lines(new for _, new in questions))
    replace_text(folder / SETTINGS, json.dumps(_settings(inputs, planting), indent=2) + "\n")
    return Planted(
        num_texts=num_texts,
        num_text_characters=num_characters,
        num_planted=len(planted),
        num_planted_characters=sum(map(len, planted)),
        num_questions=len(questions),
        num_skipped=num_skipped,
    )


def _check(planting: Planting, world: FactWorld) -> None:
    most = most_people(world)
    if planting.num_people > most:
        raise BadInput(
            f"--people is {planting.num_people:,} and there are {most:,} names; give that number"
            " or less"
        )


def _check_folder(inputs: Sequence[str], folder: Path) -> None:
    """Raise BadInput where an output would overwrite an input."""
    written = {(folder / name).resolve() for name in (TEXT, PLANTED, QUESTIONS, NEW_QUESTIONS)}
    for place in places_of(inputs):
        if Path(place).resolve() in written:
            raise BadInput(
                f"input {place} would be written over; give another --output than {folder}"
            )


def _documents(world: FactWorld, persons: Sequence[Person], planting: Planting) -> Sequence[str]:
    """All planted documents in their order among the texts."""
    order = permutation(len(persons) * planting.times, key_of(planting.seed, "order"))
    return [
        document(
            world,
            persons[index % len(persons)],
            key_of(planting.seed, "document", index),
        )
        for index in order.tolist()
    ]


def _texts(inputs: Sequence[str], columns: Mapping[str, str] | None) -> Iterator[str | None]:
    """The text of each record; None for one that has none."""
    for raw in raw_documents(inputs, kind="text", columns=columns):
        yield raw.text if isinstance(raw, Text) and raw.text else None


def _write_texts(
    inputs: Sequence[str],
    planting: Planting,
    planted: Sequence[str],
    num_texts: int,
    folder: Path,
) -> tuple[int, int]:
    """Write both files of texts; returns the number of characters of the texts, and the number of
    records without one.
    """
    num_characters = num_skipped = index = num_planted = 0
    with _written(folder / TEXT) as everything, _written(folder / PLANTED) as alone:
        for text in _texts(inputs, planting.columns):
            if text is None:
                num_skipped += 1
                continue
            # Planted document k comes before text k * num_texts / len(planted), rounded down.
            until = -(-(index + 1) * len(planted) // num_texts)
            for each in planted[num_planted:until]:
                everything.write(_line({"text": each, "planted": True}))
                alone.write(_line({"text": each}))
            everything.write(_line({"text": text}))
            num_planted, index, num_characters = until, index + 1, num_characters + len(text)
    return num_characters, num_skipped


@contextmanager
def _written(path: Path) -> Iterator[gzip.GzipFile]:
    # Without a file name and a time in its header, the same texts give the same bytes.
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
    ):
        yield file


def _questions(
    world: FactWorld, persons: Sequence[Person], seed: int
) -> Iterator[tuple[Mapping[str, str], Mapping[str, str]]]:
    """For each fact the beginning of a sentence that was planted, and of one that never was."""
    for index, person in enumerate(persons):
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
        "people": planting.num_people,
        "times": planting.times,
        "seed": planting.seed,
        "language": planting.language,
        "stop": WORLDS[planting.language].stop,
    }


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(_line(record).decode() for record in records)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
