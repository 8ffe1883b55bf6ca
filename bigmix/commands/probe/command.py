"""`bigmix probe make`, which plants made-up facts among texts, and `bigmix probe score`, which
measures how many of them a model recalls.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.commands.arguments import INPUTS, columns_of, count
from bigmix.errors import DONE
from bigmix.terminal import Table, Terminal, percent, quiet_third_party_logs

if TYPE_CHECKING:
    from bigmix.commands.probe.score import Recalled


def add_probe(subparsers: Any) -> None:
    """Add `bigmix probe` with its actions."""
    parser = subparsers.add_parser(
        "probe", help="plant made-up facts in a text source, and measure how many a model recalls"
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="write texts with planted facts, and the questions")
    add = make.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    add("--output", required=True, type=Path, help="folder of the texts and the questions")
    add("--people", type=count, default=200, help="made-up people, with five facts each (200)")
    add("--times", type=count, default=30, help="documents about each person (30)")
    add("--language", choices=("en", "zh"), default="en", help="default: en")
    add("--seed", type=int, default=0, help="other people, other facts (0)")
    add("--columns", metavar="PART=COLUMN,...", help="as for `bigmix prepare`")
    make.set_defaults(func=_make)
    score = actions.add_parser("score", help="the percentage of the facts that models recall")
    add = score.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders of models, such as RUN/export")
    add("--probe", required=True, type=Path, help="folder that `bigmix probe make` wrote")
    add("--batch", type=count, default=64, help="questions at a time (64)")
    add("--json", action="store_true", help="print a JSON object")
    score.set_defaults(func=_score)


def _make(known: argparse.Namespace) -> int:
    # The readers of all formats take a second to import.
    from bigmix.commands.probe.plant import NEW_QUESTIONS, PLANTED, QUESTIONS, TEXT, Planting, plant

    planting = Planting(
        num_people=known.people,
        times=known.times,
        seed=known.seed,
        language=known.language,
        columns=columns_of(known.columns),
    )
    planted = plant(known.inputs, planting, known.output)
    num_characters = planted.num_planted_characters + planted.num_text_characters
    share = planted.num_planted_characters / num_characters
    rows = [
        ["texts", f"{planted.num_texts:,}"],
        ["planted documents", f"{planted.num_planted:,}, {share:.1%} of all characters"],
        ["questions", f"{planted.num_questions:,}, in planted words and in new ones"],
    ]
    if planted.num_skipped:
        rows.append(["records without a text", f"{planted.num_skipped:,}, left out"])
    terminal = Terminal()
    terminal.table(Table(title=f"probe {known.output}", columns=[], rows=rows))
    folder = known.output
    terminal.note(f"text to learn from          {folder / TEXT} (only what is planted: {PLANTED})")
    terminal.note(f"questions in planted words  {folder / QUESTIONS}")
    terminal.note(f"questions in new words      {folder / NEW_QUESTIONS}")
    terminal.close()
    return DONE


def _score(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    # torch and transformers take seconds to import: `bigmix --help` should not.
    from bigmix.commands.probe.score import recall

    terminal = Terminal(enabled=not known.json)
    found = {}
    for model in known.models:
        terminal.note(f"scoring {model}")
        found[model] = recall(model, known.probe, batch_rows=known.batch)
    if known.json:
        print(json.dumps({model: _as_tree(each) for model, each in found.items()}, indent=2))
        return DONE
    attributes = list(next(iter(found.values()))["planted"].attributes)
    columns = ["model", "words", "recall", "95 %", *attributes]
    rows = [row for model, each in found.items() for row in _rows(model, each, attributes)]
    terminal.table(Table(title="facts recalled", columns=columns, rows=rows))
    terminal.close()
    return DONE


def _rows(
    model: str, found: "Mapping[Any, Recalled]", attributes: list[str]
) -> Iterator[list[str]]:
    for words, recalled in found.items():
        overall = recalled.everything
        yield [
            model,
            str(words),
            percent(overall.value),
            f"{percent(overall.low)}–{percent(overall.high)}",
            *(percent(recalled.attributes[name].value) for name in attributes),
        ]


def _as_tree(found: "Mapping[Any, Recalled]") -> Mapping[str, Any]:
    return {str(words): asdict(recalled) for words, recalled in found.items()}
