"""`bigmix probe make`, which plants made-up facts among texts, `bigmix probe score`, which measures
how many of them a model recalls, and `bigmix probe behaviour`, which puts general prompts to it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.commands.arguments import INPUTS, columns_of, count
from bigmix.errors import DONE
from bigmix.evaluation.behaviour.prompts import LANGUAGES
from bigmix.recipe.sections import Behaviour
from bigmix.terminal import Table, Terminal, percent, quiet_third_party_logs

if TYPE_CHECKING:
    from bigmix.commands.probe.score import Recalled


def add_probe(subparsers: Any) -> None:
    """Add `bigmix probe` with its actions."""
    parser = subparsers.add_parser(
        "probe", help="measure what a model knows, by planted facts, and how it answers chats"
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
    _add_behaviour(actions)


def _add_behaviour(actions: Any) -> None:
    behaviour = actions.add_parser(
        "behaviour",
        help="how a chat model answers general prompts, alone or against its base",
        description="docs/behaviour.md says what is measured.",
    )
    defaults = Behaviour()
    add = behaviour.add_argument
    add("model", metavar="MODEL", help="folder or hub name of a chat model, such as RUN/export")
    add("--base", help="the model before training, whose answers are compared with")
    add("--prompts", metavar="FILE", help="prompts of your own (.jsonl), docs/behaviour.md")
    add(
        "--languages",
        type=_languages,
        default=defaults.languages,
        metavar="LANGUAGE,...",
        help=f"of the prompts that come with bigmix ({','.join(defaults.languages)})",
    )
    add("--num-prompts", type=count, help="most prompts, evenly of all kinds (all)")
    add(
        "--max-new-tokens",
        type=count,
        default=defaults.max_new_tokens,
        help=f"tokens after which an answer is cut ({defaults.max_new_tokens})",
    )
    add(
        "--batch",
        type=count,
        default=defaults.batch_rows,
        help=f"answers at a time ({defaults.batch_rows})",
    )
    add("--output", type=Path, metavar="FOLDER", help="write the answers and the numbers here")
    add("--json", action="store_true", help="print a JSON object")
    behaviour.set_defaults(func=_behaviour)


def _languages(text: str) -> Sequence[str]:
    unknown = [name for name in text.split(",") if name not in LANGUAGES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{text} names {', '.join(unknown)}; give one or more of {','.join(LANGUAGES)}"
        )
    return text.split(",")


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


def _behaviour(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    # As above.
    from bigmix.commands.probe.behaviour import probe_behaviour, result_tree, write_result
    from bigmix.evaluation.tables import show_behaviour

    settings = Behaviour(
        prompts=known.prompts,
        languages=known.languages,
        num_prompts=known.num_prompts,
        max_new_tokens=known.max_new_tokens,
        batch_rows=known.batch,
    )
    terminal, lines = Terminal(enabled=not known.json), []
    for probed in probe_behaviour(
        known.model, known.base, settings, output=known.output, note=terminal.note
    ):
        lines.append(probed.line)
    show_behaviour(terminal, probed.path, probed.result)
    tree = result_tree(known.model, known.base, lines)
    if known.output is not None:
        write_result(known.output, tree)
        terminal.note(f"written to {known.output}")
    if known.json:
        print(json.dumps(tree, indent=2, allow_nan=False))
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
