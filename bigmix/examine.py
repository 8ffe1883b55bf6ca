"""A model and an exam go in, all that is measured of it comes out, with the evaluation line of metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.data.tokenizer import load_tokenizer
from bigmix.dist import Cluster
from bigmix.engine import Evaluable
from bigmix.evaluate import Exam, evaluate
from bigmix.held_out import Base, HeldOut, summarise
from bigmix.last_word import pieces_of_tokens
from bigmix.report import Line, held_out_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What an evaluation found; `line` has all of its numbers, under the keys of metrics.jsonl."""

    held_out: Mapping[str, HeldOut]
    line: Line


def examine(
    engine: Evaluable,
    cluster: Cluster,
    exam: Exam,
    *,
    step: int,
    base: Base | None,
    stop_asked: Callable[[], bool],
    doing: Callable[[str], None],
) -> Findings | None:
    """Everything that an exam asks of a model after a step; a collective. None where a rank is asked to stop.

    Forgetting is measured from `base`, which takes in the sources that it has not seen; None: it is not measured.
    """
    sums = evaluate(engine, cluster, exam, stop_asked=stop_asked, doing=doing)
    if sums is None:
        return None
    held_out = {}
    for name, of_documents in sums.items():
        if base is not None:
            base.take(name, of_documents)
        manifest = exam.held_out[name].manifest
        held_out[name] = summarise(
            name,
            of_documents,
            tokens_per_byte=manifest.loss_tokens / manifest.loss_bytes,
            base=base,
        )
    return Findings(
        held_out=held_out, line={"step": step, "eval": True} | held_out_numbers(held_out)
    )


def pieces_in(folder: Path) -> Sequence[bytes] | None:
    """The bytes of each id of the tokenizer in a folder; None where there is no tokenizer."""
    return pieces_of_tokens(load_tokenizer(str(folder))) if folder.is_dir() else None
