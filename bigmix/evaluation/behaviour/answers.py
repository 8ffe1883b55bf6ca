"""Lets a model answer prompts greedily, in its own chat template, on any number of ranks."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import Activity
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.inputs import BehaviourInputs
from bigmix.evaluation.behaviour.records import Answer, ChatPrompts
from bigmix.evaluation.tasks.generation import GenerationSettings, Prompt, generate
from bigmix.evaluation.tasks.inference_model import InferenceModel, batches_of_rank
from bigmix.evaluation.tasks.prompts import ANSWER, chat_pairs, stops_of
from bigmix.terminal import Terminal
from bigmix.text.chat_template import Template, open_template
from bigmix.text.formats import Conversation, Dropped
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

_TOO_LONG = "longer than the model's positions"

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True, slots=True)
class BehaviourProbe:
    """The probe, ready to be put to a model.

    `left_out` counts the prompts that the template or the model cannot take, by reason.
    `batch_rows` answers are written at a time, and `num_samples` are shown.
    """

    chat: ChatPrompts
    tokenizer: Tokenizer
    template: Template
    batch_rows: int
    num_samples: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Respondent:
    """A model that answers on the ranks of a cluster, and how it reports what it does."""

    model: InferenceModel
    cluster: Cluster
    activity: Activity


def prepare_behaviour(inputs: BehaviourInputs, max_positions: int | None) -> BehaviourProbe:
    """The prompts as tokens for a model with this many positions; None: no limit.

    Raises BadInput where the template of the tokenizer cannot be used, or no prompt is left.
    """
    tokenizer = load_tokenizer(inputs.tokenizer)
    template = _template(tokenizer)
    max_new_tokens = inputs.settings.max_new_tokens
    conversations = [
        Conversation(
            messages=[*prompt.messages, {"role": "assistant", "content": ANSWER}], tools=None
        )
        for prompt in inputs.prompts
    ]
    left_out: Counter[str] = Counter()
    kept = []
    pairs = chat_pairs(tokenizer, template, conversations)
    for prompt, pair in zip(inputs.prompts, pairs, strict=True):
        if isinstance(pair, Dropped):
            left_out[pair.reason.replace("_", " ")] += 1
        elif max_positions is not None and len(pair[0]) + max_new_tokens > max_positions:
            left_out[_TOO_LONG] += 1
        else:
            kept.append((prompt, pair[0]))
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise BadInput(
            f"no prompt of the behaviour probe can be put to the model ({reasons}); lower"
            " behaviour.max_new_tokens, give other behaviour.prompts, or set behaviour=off"
        )
    return BehaviourProbe(
        chat=ChatPrompts(
            prompts=[prompt for prompt, _ in kept],
            tokens=[tokens for _, tokens in kept],
            max_new_tokens=max_new_tokens,
        ),
        tokenizer=tokenizer,
        template=template,
        batch_rows=inputs.settings.batch_rows,
        num_samples=inputs.settings.samples,
        left_out=left_out,
    )


def probe_for_model(
    inputs: BehaviourInputs | None,
    max_positions: int | None,
    terminal: Terminal,
    *,
    is_needed: bool = False,
) -> BehaviourProbe | None:
    """The probe for a model, with what is left out shown on the terminal; None where behaviour is
    not measured.

    Raises BadInput where it cannot be put to the model. Where nothing asked for it, since
    `behaviour` is auto and not needed, that is a warning.
    """
    if inputs is None:
        return None
    try:
        probe = prepare_behaviour(inputs, max_positions)
    except BadInput as error:
        if is_needed or inputs.settings.when != "auto":
            raise
        terminal.warning(f"behaviour is not measured: {error}")
        return None
    if probe.left_out:
        terminal.note(left_out_note(probe))
    return probe


def left_out_note(probe: BehaviourProbe) -> str:
    """Which prompts are left out, in one line for the user."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in probe.left_out.items())
    num_all = len(probe.chat.prompts) + sum(probe.left_out.values())
    return f"behaviour: of {num_all} prompts some are left out: {reasons}"


def _template(tokenizer: Tokenizer) -> Template:
    try:
        return open_template(tokenizer, "tokenizer")
    except BadInput as error:
        raise BadInput(
            *(f"behaviour: {fault}; or set behaviour=off" for fault in error.faults)
        ) from error


def write_answers(
    respondent: Respondent, probe: BehaviourProbe, chat: ChatPrompts
) -> Sequence[Answer] | None:
    """The model's answer to each prompt of `chat`; a collective, with the same result on all ranks.

    None where a stop was requested on any rank.
    """
    settings = GenerationSettings(
        stops=stops_of(probe.tokenizer, probe.template), max_new_tokens=chat.max_new_tokens
    )

    def work(rows: Sequence[int]) -> list[tuple[int, Answer]]:
        prompts = [Prompt(tokens=chat.tokens[index]) for index in rows]
        outputs = generate(respondent.model, probe.tokenizer, settings, prompts)
        return [
            (index, Answer(tokens=each.tokens, text=each.text.strip(), stops=each.is_ended))
            for index, each in zip(rows, outputs, strict=True)
        ]

    # Prompts of similar lengths together. Their order must not depend on a model: the same batches
    # give the same answers, to the last bit, as long as the weights are the same.
    order = sorted(range(len(chat.tokens)), key=lambda index: (-len(chat.tokens[index]), index))
    found = over_batches(respondent, order, probe.batch_rows, "answers", work)
    return (
        None if found is None else [answer for _, answer in sorted(found, key=lambda each: each[0])]
    )


def over_batches(
    respondent: Respondent,
    rows: Sequence[T],
    size: int,
    what: str,
    work: Callable[[Sequence[T]], Iterable[U]],
) -> list[U] | None:
    """What `work` gives for all rows, of which it takes at most `size` at a time; a collective,
    with the same result on all ranks.

    None where a stop was requested on any rank, which is checked before each batch. `what` names
    the work for the watchdog.
    """
    model, cluster, activity = respondent.model, respondent.cluster, respondent.activity
    batches = batches_of_rank(rows, cluster.world, size)
    found: list[U] = []
    for number, batch in enumerate(batches, 1):
        activity.begin(f"behaviour: {what}, batch {number} of {len(batches)}")
        if any(cluster.sum_counts([activity.stop_requested()])):
            return None
        if batch.is_idle and not model.in_step:
            continue
        results = list(work(batch.rows))
        if not batch.is_idle:
            found += results
    activity.begin(f"behaviour: {what} of all ranks")
    return [result for part in cluster.gather(found) for result in part]
