"""What the headline says of runs with known numbers, kind by kind; it must never claim more."""

import json
from pathlib import Path

from support.behaviour_runs import Answers, add_behaviour
from support.run_folders import Numbers, Recipe, law, write_run

from bigmix.commands.compare.findings.phrases import quoted
from bigmix.commands.compare.judge import Comparison, judge
from bigmix.commands.compare.read import read_runs
from bigmix.commands.compare.sections import with_asides
from bigmix.commands.compare.tables import kept_table, tables

LOST = Answers(forgetting=2.31, kept=0.0)
STILL_LOST = Answers(forgetting=2.02, kept=0.05)
KEPT = Answers(forgetting=0.02, kept=1.0, half=0.03)


def run(folder: Path, answers: Answers | None, forgetting: float, share: float = 0.0) -> Path:
    numbers = Numbers(forgetting=forgetting)
    written = write_run(folder, Recipe(share=share), numbers, samples=False)
    return written if answers is None else add_behaviour(written, answers, chats=("wiki",))


def pair(folder: Path, one: Answers | None, two: Answers | None) -> Comparison:
    """A one-way run that loses 0.239 nats/token of text, and a two-way run that loses 0.039."""
    run(folder / "one-way", one, 0.239)
    run(folder / "two-way", two, 0.039, share=0.25)
    return judge(read_runs([folder]))


def test_a_run_that_kept_text_and_lost_behaviour_says_first_what_it_lost(tmp_path: Path) -> None:
    headline = pair(tmp_path, LOST, STILL_LOST).headline.replace("\N{NO-BREAK SPACE}", " ")
    assert headline.startswith(
        "Two-way training lost the base's behaviour (asked “List three fruits as bullets.” it"
        " answers “fruits”, the base “- apple - pear - plum”; instructions followed 7 %, one-way 0"
        " %, base 88 %), but kept 83 % of what one-way training lost on the text `books`"
        " (forgetting 0.04 against 0.23 nats/token), and 65 % on the chats `wiki` (forgetting 0.08"
        " against 0.24 nats/token) at about the same task loss on `gsm8k`"
    )


def test_the_example_is_the_first_prompt_that_is_no_longer_answered(tmp_path: Path) -> None:
    headline = pair(tmp_path, LOST, Answers(forgetting=2.1, kept=0.0)).headline
    assert (
        "asked “What is the capital of France?” it answers “capital”, the base “The capital of"
        " France is Paris.”" in headline
    )


def test_behaviour_that_was_kept_is_measured_by_what_was_kept_least(tmp_path: Path) -> None:
    headline = pair(tmp_path, LOST, KEPT).headline.replace("\N{NO-BREAK SPACE}", " ")
    # None of 40 prompts with constraints failed, which does not show that less than a tenth would.
    assert headline.startswith(
        "Two-way training kept most of what one-way training lost of the base's behaviour"
        " (instructions followed 88 %, one-way 0 %, base 88 %), 83 % on the text `books`"
        " (forgetting 0.04 against 0.23 nats/token), and 65 % on the chats `wiki`"
    )


def test_behaviour_is_lost_too_where_that_of_one_way_training_was_not_measured(
    tmp_path: Path,
) -> None:
    headline = pair(tmp_path, None, STILL_LOST).headline.replace("\N{NO-BREAK SPACE}", " ")
    assert headline.startswith(
        "Two-way training lost the base's behaviour (asked “List three fruits as bullets.” it"
        " answers “fruits”, the base “- apple - pear - plum”; instructions followed 7 %, base 88"
        " %), but kept 83 %"
    )
    assert "behaviour" not in pair(tmp_path / "kept", None, KEPT).headline


def test_answers_that_changed_but_follow_instructions_are_not_called_lost_behaviour(
    tmp_path: Path,
) -> None:
    """Nats alone show how far answers are from those of the base, not that they are worse."""
    moved = Answers(forgetting=0.30, kept=1.0)
    headline = pair(tmp_path, Answers(forgetting=0.31, kept=1.0), moved).headline
    assert headline.startswith(
        "Two-way training did not keep what one-way training lost of the base's behaviour"
        " (forgetting of the base's answers 0.30 against 0.31 nats/token), but kept 83 %"
    )


def test_text_chats_and_behaviour_are_claimed_each_by_itself(tmp_path: Path) -> None:
    comparison = pair(tmp_path, LOST, STILL_LOST)
    found = {f.name: (f.kind, f.verdict) for f in comparison.findings["two-way"]}
    assert found == {
        "behaviour": ("behaviour", "lost"),
        "books": ("text", "most"),
        "wiki": ("chats", "most"),
    }
    assert "on the text `books`" in comparison.headline
    assert "on the chats `wiki`" in comparison.headline


def test_the_score_of_a_task_is_next_to_its_loss(tmp_path: Path) -> None:
    headline = pair(tmp_path, LOST, KEPT).headline
    assert " task loss on `gsm8k` (2.55 against 2.54; exact match 0.3" in headline
    assert "accuracy 0.7" in headline


def test_a_task_that_got_worse_is_what_was_lost_and_not_what_was_learned(tmp_path: Path) -> None:
    for name, share, score in (("one-way", 0.0, 0.02), ("two-way", 0.25, 0.27)):
        folder = run(tmp_path / name, None, 0.3 - share, share=share)
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if line.get("eval"):
                value = score if line["step"] else 0.29
                line |= {
                    "task/facts/exact_match": value,
                    "task_low/facts/exact_match": value - 0.02,
                    "task_high/facts/exact_match": value + 0.02,
                }
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    headline = judge(read_runs([tmp_path])).headline
    assert ", and 92 % in the task `facts` (exact match 0.27, one-way 0.02, base 0.29)" in headline
    assert "`facts` exact match 0.27 against" not in headline


def test_one_run_that_lost_behaviour_says_so_first(tmp_path: Path) -> None:
    run(tmp_path / "one-way", LOST, 0.239)
    headline = judge(read_runs([tmp_path])).headline
    assert headline.startswith(
        "One-way training (one-way) lost the base's behaviour (asked “What is the capital of"
        " France?” it answers “capital”"
    )
    assert "forgot 0.2" in headline and "on the text `books`" in headline


def test_nothing_is_claimed_where_no_loss_is_certain(tmp_path: Path) -> None:
    unchanged = Answers(forgetting=0.001, kept=1.0)
    headline = pair(tmp_path, unchanged, unchanged).headline.replace("\N{NO-BREAK SPACE}", " ")
    assert headline.startswith(
        "Two-way training lost nothing for certain of the base's behaviour, nor did one-way"
        " training (instructions followed 88 %, one-way 88 %, base 88 %), kept 83 %"
    )


def test_one_run_whose_answers_only_changed_is_not_called_lost(tmp_path: Path) -> None:
    run(tmp_path / "one-way", Answers(forgetting=0.3, kept=1.0), 0.239)
    headline = judge(read_runs([tmp_path])).headline
    assert "forgot 0.30 nats/token of the base's answers, forgot" in headline
    assert "lost" not in headline


def test_over_shares_behaviour_is_said_first_and_share_by_share(tmp_path: Path) -> None:
    ends = {0.0: LOST, 0.01: STILL_LOST, 0.05: Answers(forgetting=1.2, kept=0.5), 0.25: KEPT}
    for share, answers in ends.items():
        run(tmp_path / f"{share}", answers, law(share), share=share)
    headline = judge(read_runs([tmp_path])).headline.replace("\N{NO-BREAK SPACE}", " ")
    assert headline.startswith("Behaviour was lost with 1 % of replay (with 1 %, asked “")
    assert "), kept in part with 5 % of replay, kept with 25 % of replay. Without" in headline
    assert "nats/token of the text `books`" in headline


def test_the_other_points_are_in_the_detail_and_in_the_table(tmp_path: Path) -> None:
    pair(tmp_path, LOST, STILL_LOST)
    chats = write_run(
        tmp_path / "z-chats", Recipe(share=0.25, replay="self"), Numbers(forgetting=0.07)
    )
    add_behaviour(chats, KEPT)
    comparison = judge(read_runs([tmp_path]))
    assert comparison.headline.startswith("Two-way training (two-way) lost the base's behaviour")
    assert "z-chats: behaviour kept" in comparison.detail
    table = kept_table(comparison)
    assert table is not None
    assert table.heads == ["behaviour", "books (text)", "wiki (chats)"]
    cells = {row.name: [cell.value for cell in row.cells] for row in table.rows}
    assert cells["one-way"] == ["lost", "lost", "lost"]
    assert cells["two-way"][:2] == ["lost", "kept 83 %"]
    assert cells["z-chats"][0].startswith("kept")


def test_the_table_of_behaviour_has_the_base_and_all_measures(tmp_path: Path) -> None:
    table = tables(pair(tmp_path, LOST, KEPT))[0]
    assert (table.name, table.role) == ("behaviour", "60 prompts")
    assert table.heads == [
        "forgetting",
        "KL",
        "instructions",
        "sentences",
        "stops",
        "length",
        "same",
    ]
    assert [row.cells[0].value for row in table.rows] == ["–", "+2.310", "+0.020"]


def test_a_short_comparison_of_one_text_needs_no_table_of_what_was_kept(tmp_path: Path) -> None:
    for name, share in (("one-way", 0.0), ("two-way", 0.25)):
        folder = run(tmp_path / name, None, 0.3 - share, share=share)
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.endswith("/wiki")} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert kept_table(judge(read_runs([tmp_path]))) is None


def test_answers_are_quoted_on_one_line_and_cut() -> None:
    assert quoted("a\n b") == "“a b”"
    assert quoted(" \n") == "nothing"
    assert quoted("use `x`") == "“use 'x'”"
    assert len(quoted("word " * 50)) < 80


def test_parentheses_of_an_answer_are_no_asides() -> None:
    text = "It lost (asked “what (now?” it says “:)”; 8 %), but kept 83 % (0.04)."
    parts = with_asides(text)
    assert "".join(part for part, _ in parts) == text
    assert [part for part, is_aside in parts if is_aside] == [
        "(asked “what (now?” it says “:)”; 8 %)",
        "(0.04)",
    ]
