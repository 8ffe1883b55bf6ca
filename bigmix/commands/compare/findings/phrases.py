"""Says in words what was kept and lost, with the numbers that a verdict is about."""

from collections.abc import Sequence
from itertools import pairwise

from bigmix.commands.compare.findings.answers import ComparedAnswer, telling_example
from bigmix.commands.compare.findings.kept import is_lost, percent_kept
from bigmix.commands.compare.findings.knowledge import Finding
from bigmix.commands.compare.measures import (
    BEHAVIOUR,
    FORGETTING,
    INSTRUCTIONS,
    SENTENCES,
    Spread,
    spread_of_known,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.terminal import share_percent

_PARTS_OF_ANSWERS = {INSTRUCTIONS: "instructions followed", SENTENCES: "answers in sentences"}
_MOST_LETTERS = 70  # of a prompt or an answer in a sentence


def clauses_of(
    findings: Sequence[Finding], point: RunPoint, one_way: RunPoint, *, named: bool
) -> str:
    """What a point kept against the one-way point: a sentence without its subject, such as "kept
    83 % of what one-way training lost on the text `code` (...), but only 20 % on the chats `oasst`
    (...)". `named`: whether it has the name of the one-way point.
    """
    ones = f"one-way training ({one_way.name})" if named else "one-way training"
    text = _clause(findings[0], point, one_way, _claim(findings[0], ones))
    for index, (before, finding) in enumerate(pairwise(findings), start=2):
        claim = _claim(finding, "one-way training")
        if _is_part(before) and _is_part(finding):
            claim = f"{_part(finding)} {place(finding)}"
        goes_on = any(later.is_good == finding.is_good for later in findings[index : index + 1])
        alike = "" if goes_on else "and "
        conjunction = alike if before.is_good == finding.is_good else "but "
        text += f", {conjunction}{_clause(finding, point, one_way, claim)}"
    return text


def _clause(finding: Finding, point: RunPoint, one_way: RunPoint, claim: str) -> str:
    """A claim and its numbers."""
    numbers = [_numbers(finding, point, one_way)]
    if finding.kind == BEHAVIOUR and not finding.is_good:
        # An answer says more than a percentage, so it comes first.
        numbers = [*example_of(point), *numbers]
    return f"{claim} ({'; '.join(numbers)})"


def _claim(finding: Finding, ones: str) -> str:
    where, one_way = place(finding), finding.one_way
    if finding.verdict == "lost" and finding.measure in _PARTS_OF_ANSWERS:
        return "lost the base's behaviour"
    if one_way is None:
        return f"lost something {where}"
    if not is_lost(one_way):
        if finding.verdict == "nothing":
            return f"lost nothing for certain {where}, nor did {ones}"
        return f"lost something {where}, which {ones} did not certainly lose"
    if finding.verdict == "more":
        return f"lost more {where} than {ones}"
    if finding.verdict == "lost":
        return f"did not keep what {ones} lost {where}"
    return f"kept {_part(finding)} of what {ones} lost {where}"


def _is_part(finding: Finding) -> bool:
    """Whether a verdict is on how much was kept."""
    return finding.verdict in ("all", "most", "part", "unclear")


def _part(finding: Finding) -> str:
    """How much was kept of what one-way training lost."""
    if finding.one_way is None or finding.verdict in ("all", "unclear"):
        return "all" if finding.verdict == "all" else "an unclear part"
    percent = percent_kept(finding.loss, finding.one_way)
    if finding.verdict == "part":
        return "only part" if percent is None else f"only {percent} %"
    return "most" if percent is None else f"{percent} %"


def place(finding: Finding) -> str:
    """Where something was lost: "on the text `code`"."""
    if finding.kind == BEHAVIOUR:
        return "of the base's behaviour"
    if finding.kind == "task":
        return f"in the task `{finding.name}`"
    return on_source(finding.kind, finding.name)


def on_source(kind: str, name: str) -> str:
    """A held-out source in a sentence."""
    return f"on `{name}`" if kind == "data" else f"on the {kind} `{name}`"


def _numbers(finding: Finding, point: RunPoint, one_way: RunPoint) -> str:
    """The measure that a verdict is about, of the point and of the one-way point."""
    if finding.measure != FORGETTING:
        return scores_of(finding, point, one_way)
    what = "forgetting of the base's answers" if finding.kind == BEHAVIOUR else "forgetting"
    spreads = [finding.loss, *([] if finding.one_way is None else [finding.one_way])]
    shown = " against ".join(f"{nats(spread.mean)}" for spread in spreads)
    known = all(spread.interval for spread in spreads)
    return f"{what} {shown} nats/token{'' if known else ', without intervals'}"


def head_of(finding: Finding) -> str:
    """What a finding is about, as the head of a column."""
    if finding.kind in (BEHAVIOUR, "data"):
        return finding.name
    return f"{finding.name} ({finding.kind})"


def brief(finding: Finding) -> str:
    """A verdict in two words, for a table."""
    if _is_part(finding) and finding.verdict != "unclear":
        return f"kept {_part(finding)}"
    return {"nothing": "no certain loss", "more": "lost more"}.get(finding.verdict, finding.verdict)


def brief_numbers(finding: Finding, point: RunPoint) -> str:
    """The measure that a verdict is about, of a point alone."""
    if finding.measure == FORGETTING:
        return f"{nats(finding.loss.mean)} nats/token"
    score = _score(finding, point)
    shown = "" if score is None else _fraction(finding, score.mean)
    return f"{measure_label(finding)} {shown}"


def scores_of(finding: Finding, point: RunPoint, one_way: RunPoint | None = None) -> str:
    """The fraction that a finding is about: of the point, of a one-way point and of the base."""
    points = {"": point, "one-way ": one_way}
    shown = [
        f"{name}{_fraction(finding, score.mean)}"
        for name, each in points.items()
        if each is not None and (score := _score(finding, each)) is not None
    ]
    if (base := base_score(finding, point)) is not None:
        shown.append(f"base {_fraction(finding, base.mean)}")
    return f"{measure_label(finding)} {', '.join(shown)}"


def measure_label(finding: Finding) -> str:
    """The name of the measure that a finding is about."""
    if finding.kind == "task":
        return finding.measure.replace("_", " ")
    return _PARTS_OF_ANSWERS[finding.measure]


def _score(finding: Finding, point: RunPoint) -> Spread | None:
    if finding.kind == "task":
        return point.task(finding.name, finding.measure)
    return point.behaviour(finding.measure)


def base_score(finding: Finding, point: RunPoint) -> Spread | None:
    """The value of a finding's measure before the first step of a point's runs."""
    first = [run.first for run in point.runs]
    if finding.kind == "task":
        found = [e.tasks.get(finding.name, {}).get(finding.measure) for e in first]
    else:
        found = [e.behaviour.get(finding.measure) for e in first]
    return spread_of_known(found)


def _fraction(finding: Finding, value: float) -> str:
    """A score with two decimals, as tasks are shown; a part of the answers as a percentage."""
    is_part = finding.kind == BEHAVIOUR
    return share_percent(round(value, 2)) if is_part else f"{value:.2f}"


def nats(value: float) -> str:
    """Two decimals, with a minus sign where it is not 0."""
    text = f"{value:.2f}".replace("-", "−")
    return "0.00" if text == "−0.00" else text


def example_of(point: RunPoint) -> list[str]:
    """The answer that shows what a point has lost of behaviour; empty where none was kept."""
    found = telling_example(point.runs[0].answers)
    return [] if found is None else [asked(found)]


def asked(answer: ComparedAnswer) -> str:
    """A prompt with both answers in a few words."""
    question, base = quoted(answer.question), quoted(answer.base)
    return f"asked {question} it answers {quoted(answer.answer)}, the base {base}"


def quoted(text: str) -> str:
    """A text in quotation marks, on one line and cut where it is long."""
    # A backtick would begin a name on the page.
    line = " ".join(text.split()).replace("`", "'")
    if not line:
        return "nothing"
    return f"“{line if len(line) <= _MOST_LETTERS else line[:_MOST_LETTERS].rstrip() + '…'}”"
