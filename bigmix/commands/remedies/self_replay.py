"""Samples texts from a model and prepares them as a source, to replace pretraining data.

A model that is trained on its own samples in addition to the task keeps much of what it knows
(data-free rehearsal: Sun et al., "LAMOL", 2020; Liu et al., "LLM-QAT", arXiv:2305.17888). Document
i is a function of the model, the settings and (seed, i), so that a command that was stopped
continues where it was. Letters: B documents of a batch, T tokens, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from bigmix.commands.prepare.job import Prepared, PrepareSettings, faults_of_settings, prepare
from bigmix.commands.prepare.progress import faults_of_output
from bigmix.errors import BadInput, BigmixError
from bigmix.evaluation.tasks.generation import TokenSampler
from bigmix.files import replace_text
from bigmix.model.causal_lm import max_positions, read_config
from bigmix.model.loading import open_whole
from bigmix.seeding import key_of
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
_USUAL_TOKENS = 512  # the most of a document, unless the settings or the model say less
_MOST_EMPTY = 5_000  # empty documents one after another
ReportGenerated = Callable[[int, int], None]  # documents and tokens so far


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
    """What to sample: at least `num_tokens` tokens of a model, `batch_size` documents at a time, as
    a source in `output`; the fraction `held_out` of the documents goes to a source of its own.
    """

    model: str
    num_tokens: int
    output: str
    sampling: Sampling
    batch_size: int
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedSource:
    """What was sampled: documents and tokens, how many documents are empty or were cut before the
    model ended them, and the prepared source.
    """

    num_documents: int
    num_tokens: int
    num_empty: int
    num_cut: int
    prepared: Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A document: its text, the number of its tokens without start and end, and whether it was cut
    before the model ended it. The fields are keys of a line.
    """

    document: int
    text: str
    tokens: int
    is_cut: bool


def self_replay(settings: SelfReplay, report: ReportGenerated = lambda *_: None) -> GeneratedSource:
    """Sample documents until they have enough tokens, write them to OUTPUT.jsonl, and prepare them.

    `report` is called with the documents and tokens so far. Raises BadInput where the settings are
    not allowed, or where the files at the output were made with other settings.
    """
    tokenizer, config, prepare_settings = _checked(settings)
    max_tokens = _max_tokens(settings.sampling, config)
    _keep_settings(settings, tokenizer, max_tokens)
    samples = _read(_lines_file(settings))
    _sample(settings, tokenizer, max_tokens, samples, report)
    return GeneratedSource(
        num_documents=len(samples),
        num_tokens=sum(sample.tokens for sample in samples),
        num_empty=sum(not sample.text.strip() for sample in samples),
        num_cut=sum(sample.is_cut for sample in samples),
        prepared=prepare(prepare_settings),
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
    if not 0 < sampling.top_p <= 1:
        yield f"--top-p is {sampling.top_p:g}, must be above 0 and at most 1; 1 leaves nothing out"
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


def _keep_settings(settings: SelfReplay, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Write what the lines depend on to a file; raises BadInput where there are lines of other
    settings.
    """
    lines_file = _lines_file(settings)
    path = lines_file.with_suffix(".settings.json")
    now = {
        "version": VERSION,
        "model": settings.model,
        "tokenizer": tokenizer.fingerprint[:16],
        **asdict(settings.sampling),
        "max_tokens": max_tokens,
    }
    if lines_file.exists() and not path.exists():
        raise BadInput(
            f"{lines_file} exists and was not made by this command; remove it, or give another"
            " --output"
        )
    if lines_file.exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        faults = [
            f"{key} is {value!r}, and {lines_file} was begun with {then.get(key)!r}; give that"
            " again, or remove the file"
            for key, value in now.items()
            if then.get(key) != value
        ]
        if faults:
            raise BadInput(*faults)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(now, indent=1) + "\n")


def _read(path: Path) -> list[_Sample]:
    """The documents that were written before; an incomplete line at the end is removed."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    with path.open("rb+") as file:
        file.truncate(sum(map(len, complete)))
    return [_Sample(**json.loads(line)) for line in complete]


def _sample(
    settings: SelfReplay,
    tokenizer: Tokenizer,
    max_tokens: int,
    samples: list[_Sample],
    report: ReportGenerated,
) -> None:
    """Append documents until all of them have enough tokens; the last one does not depend on the
    size of the batch.
    """
    num_tokens = sum(sample.tokens for sample in samples)
    empty_from = len(samples)
    report(len(samples), num_tokens)
    if num_tokens >= settings.num_tokens:
        return
    sampler = _DocumentSampler(settings.model, tokenizer, settings.sampling, max_tokens)
    with _lines_file(settings).open("a", encoding="utf-8") as file:
        while num_tokens < settings.num_tokens:
            first = len(samples)
            for sample in sampler.documents(range(first, first + settings.batch_size)):
                if num_tokens >= settings.num_tokens:
                    break
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
                samples.append(sample)
                num_tokens += sample.tokens
                empty_from = len(samples) if sample.tokens else empty_from
            file.flush()
            num_empty = len(samples) - empty_from
            if num_empty >= _MOST_EMPTY:
                raise BigmixError(
                    f"{settings.model} ended each of the last {num_empty:,} documents before"
                    " their first token: it does not generate texts without a prompt; give"
                    " --prompt-tokens 1 or more"
                )
            report(len(samples), num_tokens)


class _DocumentSampler:
    """A model in memory that documents are sampled from."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, sampling: Sampling, max_tokens: int
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bf16" if self._device.type == "cuda" else "fp32"
        self._lm = lm = open_whole(model, dtype=dtype, device=self._device)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._ends = _ends(lm.generation_config, tokenizer)
        barred_V = _barred(tokenizer, self._ends, lm.config.vocab_size)
        self._ordinary = np.setdiff1d(np.flatnonzero(~barred_V.numpy()), self._ends)
        self._barred_V = barred_V.to(self._device)
        self._max_tokens = max_tokens
        # The configuration of the model may have penalties and truncations, with which the samples
        # would not be what it has learned.
        lm.generation_config = transformers.GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,  # the sampler draws, and leaves one token to choose
            eos_token_id=self._ends,
            pad_token_id=tokenizer.eos_id,
        )

    def documents(self, numbers: range) -> Iterator[_Sample]:
        """The documents of these numbers; a document depends on the others only by rounding."""
        draws = [
            np.random.default_rng(key_of(self._sampling.seed, "self-replay", n)) for n in numbers
        ]
        prompt_BT = torch.tensor([self._prompt(draw) for draw in draws], device=self._device)
        uniforms_BT = np.stack([draw.random(self._max_tokens) for draw in draws])
        token_sampler = TokenSampler(
            torch.from_numpy(uniforms_BT).to(self._device),
            prompt_BT.shape[1],
            partial(probabilities, self._sampling, self._barred_V),
        )
        with torch.no_grad():
            generated_BT = self._lm.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                logits_processor=transformers.LogitsProcessorList([token_sampler]),
            )
        start = prompt_BT.shape[1] - self._sampling.prompt_tokens
        for number, ids in zip(numbers, generated_BT[:, start:].tolist(), strict=True):
            yield self._document(number, ids)

    def _prompt(self, draw: np.random.Generator) -> list[int]:
        """The ids that a document begins with: BOS where the tokenizer adds one, and the drawn
        tokens. Without either it is the end token, after which the model generates the first one.
        """
        drawn = draw.choice(self._ordinary, self._sampling.prompt_tokens)
        if self._tokenizer.bos_id is not None:
            return [self._tokenizer.bos_id, *drawn.tolist()]
        return drawn.tolist() or [self._tokenizer.eos_id]

    def _document(self, number: int, ids: Sequence[int]) -> _Sample:
        end = next((at for at, token in enumerate(ids) if token in self._ends), None)
        own = ids[:end]
        return _Sample(
            document=number,
            text=self._tokenizer.decode(own),
            tokens=len(own),
            is_cut=end is None,
        )


def _ends(generation: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a document for the tokenizer or for the model."""
    named = getattr(generation, "eos_token_id", None)
    own = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_id, *(token for token in own if token is not None)})


def _barred(tokenizer: Tokenizer, ends: Sequence[int], vocab_size: int) -> Tensor:
    """True for ids [V] that are never drawn: special tokens other than the ends, and rows of the
    head without a token.
    """
    barred_V = torch.zeros(vocab_size, dtype=torch.bool)
    barred_V[tokenizer.vocab_size :] = True
    barred_V[[token for token in tokenizer.special_ids if token < vocab_size]] = True
    barred_V[list(ends)] = False
    return barred_V


def probabilities(sampling: Sampling, barred_V: Tensor, logits_BV: Tensor) -> Tensor:
    """The probabilities [B, V] of the next tokens at a temperature and top_p; 0 for barred ids.

    Those that top_p leaves need not sum to 1.
    """
    logits_BV = logits_BV.double().masked_fill(barred_V, -torch.inf)
    probabilities_BV = (logits_BV / sampling.temperature).softmax(1)
    if sampling.top_p < 1:
        probabilities_BV = _truncated(probabilities_BV, sampling.top_p)
    return probabilities_BV


def _truncated(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The probabilities with 0 for the least probable tokens, as long as the others sum to `top_p`
    (Holtzman et al., 2020).

    transformers' TopPLogitsWarper is not used: of equally probable tokens, which are common among
    logits in bf16, it keeps others, and the documents of a seed would change.
    """
    sorted_BV, order_BV = probabilities_BV.sort(1, descending=True)
    before_BV = sorted_BV.cumsum(1) - sorted_BV
    kept_BV = torch.where(before_BV < top_p, sorted_BV, 0.0)
    return torch.zeros_like(probabilities_BV).scatter(1, order_BV, kept_BV)
