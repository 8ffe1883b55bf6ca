"""Adds what the behaviour probe writes to the folder of a run, with known numbers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigmix.evaluation.behaviour.sentences import holds_sentence

# Question, the base's answer, an answer after one-way training, what the answer must hold.
PROMPTS = (
    (
        "fact",
        "What is the capital of France?",
        "The capital of France is Paris.",
        "capital",
        "paris",
    ),
    (
        "fact",
        "Who wrote Hamlet?",
        "Hamlet was written by William Shakespeare.",
        "play",
        "shakespeare",
    ),
    ("fact", "太阳系最大的行星是哪一颗？", "太阳系最大的行星是木星。", "行星", "木星"),
    (
        "explanation",
        "Why is the sky blue?",
        "Air scatters blue light more than red light.",
        "sky",
        None,
    ),
    (
        "writing",
        "Write one line about autumn.",
        "Leaves drift through the golden air.",
        "line",
        None,
    ),
    ("list", "List three fruits as bullets.", "- apple\n- pear\n- plum", "fruits", "- "),
    ("format", "Answer with yes or no: is ice cold?", "Yes", "ice", "yes"),
    ("format", "Is `2` even? One word.", "Maybe it is even.", "Maybe it is even.", "yes"),
    ("arithmetic", "What is 7 times 8?", "7 times 8 is 56.", "7", "56"),
    ("translation", "Translate to French: good morning.", "Bonjour.", "morning", "bonjour"),
    ("unknowable", "What did I eat yesterday?", "I cannot know what you ate.", "yesterday", None),
    (
        "conversation",
        "And its population?",
        "About two million people live there.",
        "population",
        None,
    ),
)
COPIES = 5  # of each prompt, so that there are as many as the probe has
NUM_PROMPTS = COPIES * len(PROMPTS)
NUM_CONSTRAINED = COPIES * sum(must is not None for *_, must in PROMPTS)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How a run answers: nats that it forgot of the base's answers, and the part of the prompts,
    from the first on, that it answers like the base; the others it answers with a word.
    """

    forgetting: float
    kept: float
    half: float = 0.05  # of the interval of forgetting


def add_behaviour(folder: Path, answers: Answers, *, chats: tuple[str, ...] = ()) -> Path:
    """Add a probe to all evaluations of a run; `chats` are the held-out sources that have
    conversations, all others have texts.
    """
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(line["step"] for line in lines)
    for line in lines:
        if line.get("eval"):
            part = (1 - math.exp(-4 * line["step"] / last)) / (1 - math.exp(-4))
            line |= measures(answers, part, prompts_of(1 - part * (1 - answers.kept)))
            sources = [k.split("/")[1] for k in line if k.startswith("held_out_loss/")]
            line |= {f"held_out_chat/{source}": source in chats for source in sources}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["behaviour"] = {"when": "auto", "num_prompts": None, "max_new_tokens": 96}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "behaviour").mkdir()
    for step, kept in ((0, 1.0), (last, answers.kept)):
        write_answers(folder / f"behaviour/step-{step:06d}.jsonl", prompts_of(kept))
    return folder


def prompts_of(kept: float) -> list[dict[str, Any]]:
    """The lines of a file of answers; the first part of the prompts is answered like the base."""
    lines = []
    for copy in range(COPIES):
        for index, (kind, question, base, word, must) in enumerate(PROMPTS):
            number = len(lines)
            is_kept = number < round(kept * NUM_PROMPTS)
            answer = base if is_kept else word
            lines.append(
                {
                    "id": f"en-{kind}-{index:03d}-{copy}",
                    "language": "zh" if ord(question[0]) > 255 else "en",
                    "kind": kind,
                    "messages": [
                        *(
                            [{"role": "user", "content": "Tell me of Paris."}]
                            * (kind == "conversation")
                        ),
                        *(
                            [{"role": "assistant", "content": "Paris is a city."}]
                            * (kind == "conversation")
                        ),
                        {"role": "user", "content": question + " " * copy},
                    ],
                    "constraints": [] if must is None else [{"type": "contains", "any": [must]}],
                    "base": base,
                    "answer": answer,
                    "followed": None if must is None else must in answer.lower(),
                    "base_followed": None if must is None else must in base.lower(),
                    "stops": True,
                    "tokens": max(1, len(answer) // 4),
                }
            )
    return lines


def write_answers(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of answers."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def measures(answers: Answers, part: float, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys of an evaluation line, with the forgetting that the run has reached in part."""
    constrained = [line for line in lines if line["followed"] is not None]
    forgotten = part * answers.forgetting
    found: dict[str, Any] = {}
    for key, value, half in (
        ("loss", 0.31 + forgotten, answers.half),
        ("forgetting", forgotten, part * answers.half),
        ("kl", 0.9 * forgotten, part * answers.half),
        ("instructions", sum(line["followed"] for line in constrained) / len(constrained), 0.1),
        ("sentences", sum(holds_sentence(line["answer"]) for line in lines) / len(lines), 0.08),
        ("stops", 1.0, 0.0),
        ("length", sum(line["tokens"] for line in lines) / len(lines), 1.2),
        ("same", sum(line["answer"] == line["base"] for line in lines) / len(lines), 0.05),
    ):
        found |= {
            f"behaviour/{key}": value,
            f"behaviour_low/{key}": value - half,
            f"behaviour_high/{key}": value + half,
        }
    return found | {
        "behaviour_prompts": len(lines),
        "behaviour_constrained": len(constrained),
        "behaviour_tokens": 20 * len(lines),
    }
