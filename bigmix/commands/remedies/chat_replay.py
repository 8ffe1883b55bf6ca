"""Lets a chat model answer prompts and prepares its answers as a source, to replay how it answers.

The prompts come with bigmix, from a user's file, or from the model itself. Sampled at temperature 1
without top_p, the loss on the answers is the entropy of the model plus KL(model || trained model)
in expectation, so that it is smallest where the model stays what it is.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bigmix.commands.prepare.job import (
    Prepared,
    PrepareSettings,
    faults_of_settings,
    prepare,
    warnings_about_dropped,
)
from bigmix.commands.prepare.progress import faults_of_output, held_out_folder
from bigmix.commands.remedies.chat_prompts import (
    SEEDS,
    SYSTEMS,
    ChatPrompt,
    built_in_prompts,
    facts_of,
    ids_before_answer,
    read_chat_prompts,
)
from bigmix.commands.remedies.conversations import (
    MOST_QUESTION_TOKENS,
    AnswerSampling,
    ConversationSampler,
    TurnFormat,
)
from bigmix.commands.remedies.generator import (
    TextGenerator,
    barred_ids,
    ends_of,
    faults_of_top_p,
    usual_rows,
)
from bigmix.commands.remedies.outcomes import Outcome, OutcomeFiles, files_of_outcomes
from bigmix.commands.remedies.sample_files import Report, SampleOrder, keep_settings, kept_settings
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.prompts import LANGUAGES
from bigmix.files import sha256_of
from bigmix.model.causal_lm import max_positions, read_config
from bigmix.model.loading import open_whole
from bigmix.text.chat_template import open_template
from bigmix.text.tokenizer import load_tokenizer

VERSION = 1
BUILT_IN, OF_MODEL = "seeds", "model"  # the prompts that are no file
_USUAL_TOKENS = 1024  # the most of an answer, unless the settings or the model say less
_USUAL_SYSTEMS = 0.3
_SYSTEM_TOKENS = 128  # no system prompt that comes with bigmix has more
_MOST_FAULTS = 10  # of a user's prompts that are named
_MANY_ENDLESS = 0.05  # of the answers, above which there is a note


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSampling:
    """How conversations are sampled.

    `prompts` is seeds, model or a file; `languages` are those of the prompts and system prompts
    that come with bigmix. None: `systems` is 0.3, or 0 where the template takes no system prompt;
    `max_tokens` is 1024, or what the model has positions for.
    """

    prompts: str = BUILT_IN
    languages: Sequence[str] = LANGUAGES
    temperatures: Sequence[float] = (1.0,)
    top_p: float = 1.0
    greedy_first: bool = False
    systems: float | None = None
    seed: int = 0
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReplay:
    """What to sample: conversations with at least `num_tokens` loss tokens, `batch_size` at a time
    (None: by the device), as a source in `output`; those of the fraction `held_out` of the prompts
    go to a source of their own.
    """

    model: str
    num_tokens: int
    output: str
    sampling: ChatSampling
    batch_size: int | None
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedChats:
    """What was sampled: the conversations that are kept and their loss tokens, those that are
    dropped by reason and the file they are in, the prepared sources, and what the user should know
    of it.
    """

    num_kept: int
    num_tokens: int
    reasons: Counter[str]
    dropped_file: Path
    prepared: Prepared
    held_out: Prepared | None
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """What the settings name, opened, with what they leave open decided."""

    turn_format: TurnFormat
    prompts: Sequence[ChatPrompt] | None
    answers: AnswerSampling
    dtype: str


def chat_replay(settings: ChatReplay, report: Report = lambda *_: None) -> ReplayedChats:
    """Sample conversations until they have enough loss tokens, write them to OUTPUT.jsonl, and
    prepare them with the model's own chat template.

    `report` is called with the kept conversations and tokens so far. Raises BadInput where the
    settings are not allowed, or where the files at the output were made with other settings;
    BigmixError where nearly all conversations are dropped.
    """
    checked = _checked(settings)
    output = Path(settings.output)
    keep_settings(files_of_outcomes(output), _settings_of_lines(settings, checked))
    files = OutcomeFiles(output, held_out=settings.held_out, is_of_model=checked.prompts is None)
    with files:
        _sample(settings, checked, files, report)
    if not files.num_learned:
        raise BadInput(
            f"all {files.num_held_out} conversations are held out, since their prompts are; give"
            " more --tokens or --prompts, or a smaller --held-out"
        )
    held_out = None
    if files.num_held_out:
        held_out = prepare(_prepare_settings(settings, files.held_out, held_out_folder(output)))
    prepared = prepare(_prepare_settings(settings, files.learned, output))
    return ReplayedChats(
        num_kept=files.num_kept,
        num_tokens=files.num_tokens,
        reasons=files.reasons,
        dropped_file=files.dropped,
        prepared=prepared,
        held_out=held_out,
        notes=list(_notes(settings, checked, files, prepared)),
    )


def _checked(settings: ChatReplay) -> _Checked:
    """Raises BadInput with what is not allowed."""
    output, sampling = Path(settings.output), settings.sampling
    faults = [
        *_faults(sampling),
        *faults_of_settings(
            replace(_prepare_settings(settings, output, output), held_out=settings.held_out)
        ),
        *faults_of_output(output, holds_out=settings.held_out > 0),
    ]
    if faults:
        raise BadInput(*faults)
    tokenizer = load_tokenizer(settings.model)
    if tokenizer.chat_template is None:
        raise BadInput(
            f"{settings.model} has no chat template, so it is no chat model; give --kind text, or a"
            " folder whose tokenizer has its template"
        )
    template = open_template(tokenizer, "tokenizer")
    turn_format = TurnFormat(
        tokenizer=tokenizer, template=template, facts=facts_of(tokenizer, template)
    )
    answers = _answers(settings, turn_format)
    return _Checked(
        turn_format=turn_format,
        prompts=_prompts(settings, turn_format, answers),
        answers=answers,
        dtype=str(kept_settings(files_of_outcomes(output)[0]).get("dtype", _precision())),
    )


def _faults(sampling: ChatSampling) -> Iterator[str]:
    for temperature in sampling.temperatures:
        if not 0 < temperature < math.inf:
            yield (
                f"--temperature is {temperature:g}, must be above 0; 1 samples what the model has"
                " learned, and --greedy-first gives likeliest answers"
            )
    yield from faults_of_top_p(sampling.top_p)
    if sampling.systems is not None and not 0 <= sampling.systems <= 1:
        yield f"--systems is {sampling.systems:g}, must be a fraction of the conversations"
    unknown = [name for name in sampling.languages if name not in LANGUAGES]
    if unknown or not sampling.languages:
        yield (
            f"--languages has {', '.join(unknown) or 'none'}, must be of {', '.join(LANGUAGES)};"
            " for prompts in others give a file as --prompts"
        )


def _answers(settings: ChatReplay, turn_format: TurnFormat) -> AnswerSampling:
    """How answers are sampled; raises BadInput where the template or the model does not allow what
    is asked.
    """
    sampling, facts = settings.sampling, turn_format.facts
    capacity = max_positions(read_config(settings.model, None, key="MODEL"))
    room = math.inf if capacity is None else capacity
    usual = _USUAL_TOKENS if capacity is None else min(_USUAL_TOKENS, max(capacity // 2, 1))
    max_tokens = sampling.max_tokens or usual
    faults = []
    if sampling.systems and not facts.takes_system:
        faults.append(
            f"--systems is {sampling.systems:g}, and the chat template of {settings.model} takes no"
            " system prompt; give --systems 0"
        )
    if sampling.prompts == OF_MODEL:
        if not facts.question_ends:
            faults.append(
                f"the chat template of {settings.model} ends a question without a special token, so"
                " --prompts model does not know where one ends; give --prompts seeds or a file"
            )
        needed = len(facts.before_question) + MOST_QUESTION_TOKENS + _SYSTEM_TOKENS + max_tokens
        if needed > room:
            faults.append(
                f"--max-tokens is {max_tokens}, which with a question of the model needs"
                f" {needed} positions, {settings.model} has {capacity}; give fewer"
            )
    if faults:
        raise BadInput(*faults)
    usual_systems = _USUAL_SYSTEMS if facts.takes_system else 0.0
    return AnswerSampling(
        temperatures=sampling.temperatures,
        greedy_first=sampling.greedy_first,
        systems=usual_systems if sampling.systems is None else sampling.systems,
        languages=sampling.languages,
        seed=sampling.seed,
        max_tokens=max_tokens,
    )


def _prompts(
    settings: ChatReplay, turn_format: TurnFormat, answers: AnswerSampling
) -> Sequence[ChatPrompt] | None:
    """The prompts, None where the model writes them; raises BadInput with those that the model
    cannot be asked.
    """
    if settings.sampling.prompts == OF_MODEL:
        return None
    if settings.sampling.prompts == BUILT_IN:
        prompts = built_in_prompts(settings.sampling.languages)
    else:
        prompts = read_chat_prompts(settings.sampling.prompts)
    capacity = max_positions(read_config(settings.model, None, key="MODEL"))
    room = math.inf if capacity is None else capacity - answers.max_tokens
    faults = []
    for prompt in prompts:
        ids = ids_before_answer(turn_format.tokenizer, turn_format.template, prompt.messages)
        spare = _SYSTEM_TOKENS if prompt.system is None and answers.systems else 0
        if ids is None:
            faults.append(f"{prompt.id}: the chat template does not render it")
        elif len(ids) + spare > room:
            faults.append(
                f"{prompt.id}: has {len(ids)} tokens, and with an answer of {answers.max_tokens}"
                f" more than the {capacity} positions of {settings.model}; shorten it, or give a"
                " smaller --max-tokens"
            )
    if faults:
        more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise BadInput(*faults[:_MOST_FAULTS], *more)
    return prompts


def _precision() -> str:
    """bf16 where the device multiplies in it faster than in fp32: a GPU, or a CPU with AMX. With
    AVX-512's bf16 alone a model is no faster.
    """
    if torch.cuda.is_available():
        return "bf16"
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") else "fp32"


def _settings_of_lines(settings: ChatReplay, checked: _Checked) -> dict[str, Any]:
    """What the conversations depend on."""
    file = {BUILT_IN: SEEDS, OF_MODEL: None}.get(
        settings.sampling.prompts, Path(settings.sampling.prompts)
    )
    tokenizer, template = checked.turn_format.tokenizer, checked.turn_format.template
    return {
        "version": VERSION,
        "kind": "chat",
        "model": settings.model,
        "dtype": checked.dtype,
        "tokenizer": tokenizer.fingerprint[:16],
        "template": template.sha256[:16],
        "prompts": settings.sampling.prompts,
        "content of the prompts": None if file is None else sha256_of(file)[:16],
        "content of the system prompts": sha256_of(SYSTEMS)[:16],
        "top_p": settings.sampling.top_p,
        **{key: _plain(value) for key, value in asdict(checked.answers).items()},
        "held_out": settings.held_out,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _prepare_settings(settings: ChatReplay, lines_file: Path, output: Path) -> PrepareSettings:
    return PrepareSettings(
        inputs=[str(lines_file)],
        tokenizer=settings.model,
        output=str(output),
        kind="chat",
        template="tokenizer",
        columns={"messages": "messages"},
    )


def _sample(settings: ChatReplay, checked: _Checked, files: OutcomeFiles, report: Report) -> None:
    """Append conversations until there are enough tokens."""
    before = files.num_kept, files.num_tokens
    report(*before)
    if files.num_tokens >= settings.num_tokens:
        return
    sampler = _sampler(settings, checked)
    order = SampleOrder[Outcome](
        files.num_conversations,
        settings.num_tokens - files.num_tokens,
        lambda num, tokens: report(before[0] + num, before[1] + tokens),
    )
    for outcome in sampler.outcomes(order):
        judged = files.judged(outcome)
        if judged.reason != outcome.reason:
            order.leave_out(outcome.tokens)
        files.add(judged)
        if files.num_tokens >= settings.num_tokens:
            return


def _sampler(settings: ChatReplay, checked: _Checked) -> ConversationSampler:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = open_whole(settings.model, dtype=checked.dtype, device=device)
    tokenizer, facts = checked.turn_format.tokenizer, checked.turn_format.facts
    of_question = facts.question_ends if checked.prompts is None else ()
    ends = sorted({*ends_of(lm, tokenizer), *facts.answer_ends, *of_question})
    generator = TextGenerator(
        lm,
        ends=ends,
        barred_V=barred_ids(tokenizer, ends, lm.config.vocab_size),
        top_p=settings.sampling.top_p,
        num_rows=settings.batch_size or usual_rows(lm, checked.answers.max_tokens),
    )
    return ConversationSampler(generator, checked.turn_format, checked.answers, checked.prompts)


def _notes(
    settings: ChatReplay, checked: _Checked, files: OutcomeFiles, prepared: Prepared
) -> Iterator[str]:
    num_endless, most = files.reasons["endless"], checked.answers.max_tokens
    if num_endless > _MANY_ENDLESS * files.num_conversations:
        yield (
            f"{num_endless / files.num_conversations:.0%} of the conversations are dropped since"
            f" their answers have more than {most} tokens, so long answers are missing; raise"
            " --max-tokens"
        )
    # Other warnings of `prepare` are about a chat template that the model was not trained with.
    yield from warnings_about_dropped(prepared.manifest)
    if not checked.turn_format.facts.takes_system:
        yield f"the chat template of {settings.model} takes no system prompt, so none is given"
    if settings.held_out and not files.num_held_out:
        yield "no conversation is held out: there are too few prompts"
