"""Samples texts from a model and prepares them as a source, to replace pretraining data.

A model that is trained on its own samples in addition to the task keeps much of what it knows
(data-free rehearsal: Sun et al., "LAMOL", 2020; Liu et al., "LLM-QAT", arXiv:2305.17888). Document
i is a function of the model, the settings and (seed, i), so that a command that was stopped
continues where it was. Letters: T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmix.commands.prepare.job import Prepared, PrepareSettings, faults_of_settings, prepare
from bigmix.commands.prepare.progress import faults_of_output
from bigmix.commands.remedies.generator import (
    Completion,
    TextGenerator,
    barred_ids,
    ends_of,
    faults_of_top_p,
    usual_rows,
)
from bigmix.commands.remedies.row_cache import GenerationRequest
from bigmix.commands.remedies.sample_files import (
    Report,
    SampleOrder,
    complete_lines,
    keep_settings,
    line_of,
)
from bigmix.errors import BadInput, BigmixError
from bigmix.model.causal_lm import max_positions, read_config
from bigmix.model.loading import open_whole
from bigmix.seeding import key_of
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
_USUAL_TOKENS = 512  # the most of a document, unless the settings or the model say less
_MOST_EMPTY = 5_000  # empty documents one after another
# Special tokens that separate documents in pretraining. What ends a turn of a chat model, which is
# often its eos token, does not.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How documents are sampled: each of at most `max_tokens` tokens; None: 512, or what the model
    has positions for.

    The first `prompt_tokens` of a document are drawn uniformly from the vocabulary, and not by the
    model. The fields are keys of the settings file.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfReplay:
    """What to sample: at least `num_tokens` tokens of a model, `batch_size` documents at a time
    (None: by the device), as a source in `output`; the fraction `held_out` of the documents goes to
    a source of its own.
    """

    model: str
    num_tokens: int
    output: str
    sampling: Sampling
    batch_size: int | None
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedSource:
    """What was sampled: documents and tokens, how many documents are empty or were cut before the
    model ended them, the prepared source, and what the user should know of it.
    """

    num_documents: int
    num_tokens: int
    num_empty: int
    num_cut: int
    prepared: Prepared
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A document: its text, the number of its tokens without start and end, and whether it was cut
    before the model ended it. The fields are keys of a line.
    """

    document: int
    text: str
    tokens: int
    is_cut: bool


def self_replay(settings: SelfReplay, report: Report = lambda *_: None) -> GeneratedSource:
    """Sample documents until they have enough tokens, write them to OUTPUT.jsonl, and prepare them.

    `report` is called with the documents and tokens so far. Raises BadInput where the settings are
    not allowed, or where the files at the output were made with other settings.
    """
    tokenizer, config, prepare_settings = _checked(settings)
    max_tokens = _max_tokens(settings.sampling, config)
    start = _document_start(tokenizer)
    lines_file = _lines_file(settings)
    keep_settings([lines_file], _settings_of_lines(settings, tokenizer, max_tokens, start))
    samples = [_Sample(**line) for line in complete_lines(lines_file)]
    _sample(settings, tokenizer, max_tokens, samples, report)
    return GeneratedSource(
        num_documents=len(samples),
        num_tokens=sum(sample.tokens for sample in samples),
        num_empty=sum(not sample.text.strip() for sample in samples),
        num_cut=sum(sample.is_cut for sample in samples),
        prepared=prepare(prepare_settings),
        notes=list(_notes(settings, tokenizer, start)),
    )


def _checked(settings: SelfReplay) -> tuple[Tokenizer, Any, PrepareSettings]:
    """The tokenizer, the configuration of the model and the settings of the source; raises BadInput
    with what is not allowed.
    """
    prepare_settings = PrepareSettings(
        inputs=[str(_lines_file(settings))],
        tokenizer=settings.model,
        output=settings.output,
        kind="text",
        columns={"text": "text"},
        held_out=settings.held_out,
    )
    faults = [
        *_faults(settings.sampling),
        *faults_of_settings(prepare_settings),
        *faults_of_output(Path(settings.output), holds_out=settings.held_out > 0),
    ]
    if faults:
        raise BadInput(*faults)
    config = read_config(settings.model, None, key="MODEL")
    capacity = max_positions(config)
    num_needed = (settings.sampling.max_tokens or 1) + settings.sampling.prompt_tokens + 1
    if capacity is not None and num_needed > capacity:
        raise BadInput(
            f"--max-tokens and --prompt-tokens make documents of {num_needed} tokens with their"
            f" start, {settings.model} has positions for {capacity}; give fewer"
        )
    return load_tokenizer(settings.model), config, prepare_settings


def _faults(sampling: Sampling) -> Iterator[str]:
    if not 0 < sampling.temperature < math.inf:
        yield (
            f"--temperature is {sampling.temperature:g}, must be above 0; 1 samples what the model"
            " has learned"
        )
    yield from faults_of_top_p(sampling.top_p)
    if sampling.prompt_tokens < 0:
        yield f"--prompt-tokens is {sampling.prompt_tokens}, must be 0 or more"


def _max_tokens(sampling: Sampling, config: Any) -> int:
    """The most tokens that the model generates for a document."""
    capacity = max_positions(config)
    usual = _USUAL_TOKENS
    if capacity is not None:
        usual = min(usual, capacity - sampling.prompt_tokens - 1)
    return sampling.max_tokens or usual


def _lines_file(settings: SelfReplay) -> Path:
    output = Path(settings.output)
    return output.with_name(f"{output.name}.jsonl")


def _settings_of_lines(
    settings: SelfReplay, tokenizer: Tokenizer, max_tokens: int, start: int
) -> dict[str, Any]:
    """What the documents depend on."""
    now = {
        "version": VERSION,
        "model": settings.model,
        "tokenizer": tokenizer.fingerprint[:16],
        **asdict(settings.sampling),
        "max_tokens": max_tokens,
    }
    if tokenizer.bos_id is None and start != tokenizer.eos_id:
        now["start"] = tokenizer.text_of(start)
    return now


def _document_start(tokenizer: Tokenizer) -> int:
    """The id that a document begins after: BOS where the tokenizer adds one, else the end of the
    document before it. Of a chat model that is a token that separates documents in pretraining, if
    it has one: after the end of a turn it would go on with a conversation.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    by_name = {tokenizer.text_of(token): token for token in tokenizer.special_ids}
    if tokenizer.chat_template is None or tokenizer.eos_token in _SEPARATORS:
        return tokenizer.eos_id
    return next((by_name[name] for name in _SEPARATORS if name in by_name), tokenizer.eos_id)


def _notes(settings: SelfReplay, tokenizer: Tokenizer, start: int) -> Iterator[str]:
    if tokenizer.chat_template is None:
        return
    yield (
        f"{settings.model} is a chat model: these texts keep what it knows, not how it answers; for"
        " that, sample answers as well, with --kind chat and another --output"
    )
    is_turn_end = start == tokenizer.eos_id and tokenizer.eos_token not in _SEPARATORS
    if is_turn_end and tokenizer.bos_id is None and not settings.sampling.prompt_tokens:
        yield (
            f"the tokenizer of {settings.model} has no token that is known to begin a document, so"
            f" the texts begin after {tokenizer.eos_token}, which may end a turn of a conversation;"
            " where they look broken, give --prompt-tokens 1"
        )


def _sample(
    settings: SelfReplay,
    tokenizer: Tokenizer,
    max_tokens: int,
    samples: list[_Sample],
    report: Report,
) -> None:
    """Append documents until all of them have enough tokens; the last one does not depend on the
    size of the batch.
    """
    num_tokens = sum(sample.tokens for sample in samples)
    empty_from = len(samples)
    before = len(samples), num_tokens
    report(*before)
    if num_tokens >= settings.num_tokens:
        return
    sampler = _DocumentSampler(settings, tokenizer, max_tokens)
    order = SampleOrder[_Sample](
        len(samples),
        settings.num_tokens - num_tokens,
        lambda num, tokens: report(before[0] + num, before[1] + tokens),
    )
    with _lines_file(settings).open("a", encoding="utf-8") as file:
        for sample in sampler.documents(order):
            file.write(line_of(asdict(sample)))
            file.flush()
            samples.append(sample)
            num_tokens += sample.tokens
            if num_tokens >= settings.num_tokens:
                return
            empty_from = len(samples) if sample.tokens else empty_from
            if len(samples) - empty_from >= _MOST_EMPTY:
                raise BigmixError(
                    f"{settings.model} ended each of the last {_MOST_EMPTY:,} documents before"
                    " their first token: it does not generate texts without a prompt; give"
                    " --prompt-tokens 1 or more"
                )


class _DocumentSampler:
    """A model in memory that documents are sampled from."""

    def __init__(self, settings: SelfReplay, tokenizer: Tokenizer, max_tokens: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bf16" if device.type == "cuda" else "fp32"
        lm = open_whole(settings.model, dtype=dtype, device=device)
        self._tokenizer = tokenizer
        self._sampling = settings.sampling
        self._start = _document_start(tokenizer)
        self._max_tokens = max_tokens
        ends = ends_of(lm, tokenizer)
        if tokenizer.bos_id is None:
            ends = sorted({*ends, self._start})
        barred_V = barred_ids(tokenizer, ends, lm.config.vocab_size)
        self._ordinary = np.setdiff1d(np.flatnonzero(~barred_V.numpy()), ends)
        self._generator = TextGenerator(
            lm,
            ends=ends,
            barred_V=barred_V,
            top_p=settings.sampling.top_p,
            num_rows=settings.batch_size or usual_rows(lm, max_tokens),
        )

    def documents(self, order: SampleOrder[_Sample]) -> Iterator[_Sample]:
        """The documents in order, as long as there are to be more."""

        def next_request() -> GenerationRequest | None:
            number = order.begin()
            return None if number is None else self._request(number)

        for completion in self._generator.completions(next_request):
            sample = self._document(completion)
            yield from order.end(sample.document, sample, sample.tokens)

    def _request(self, number: int) -> GenerationRequest:
        """A document depends on no other, except by rounding. It begins with the start and the
        drawn tokens; without BOS the drawn tokens need no start.
        """
        draw = np.random.default_rng(key_of(self._sampling.seed, "self-replay", number))
        drawn = draw.choice(self._ordinary, self._sampling.prompt_tokens).tolist()
        is_started = self._tokenizer.bos_id is not None or not drawn
        return GenerationRequest(
            number=number,
            prompt=[self._start, *drawn] if is_started else drawn,
            uniforms_T=draw.random(self._max_tokens),
            temperature=self._sampling.temperature,
        )

    def _document(self, completion: Completion) -> _Sample:
        prompt = completion.request.prompt
        drawn = prompt[len(prompt) - self._sampling.prompt_tokens :]
        own = [*drawn, *completion.ids]
        return _Sample(
            document=completion.request.number,
            text=self._tokenizer.decode(own),
            tokens=len(own),
            is_cut=completion.is_cut,
        )
