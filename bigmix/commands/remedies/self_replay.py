"""A model goes in; texts that it makes up by itself come out, as readable lines and as a prepared
source.

They stand for pretraining data where there is none: a model that is trained on samples of itself
beside the task keeps much of what it knows (data-free rehearsal: Sun et al., "LAMOL", 2020; Liu et
al., "LLM-QAT", arXiv:2305.17888). Document i is a function of the model, the settings and (seed,
i): what was stopped goes on where it is.
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
_USUAL_TOKENS = 512
_MOST_EMPTY = 5_000  # documents in a row
ReportGenerated = Callable[[int, int], None]  # documents and tokens so far


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How documents are made up: each of at most `max_tokens`, None: 512 or what the model has
    positions for.

    The first `prompt_tokens` of a document are drawn from the vocabulary, all alike, and not by the
    model.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfReplay:
    """What to make: at least `tokens` tokens of a model, `batch` documents at a time, as a source
    in `output`.
    """

    model: str
    tokens: int
    output: str
    sampling: Sampling
    batch: int
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What was made: documents and tokens, those that the model left empty or did not end, and the
    prepared source.
    """

    documents: int
    tokens: int
    empty: int
    cut: int
    prepared: Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A document: its text, its tokens without those of its ends, and whether it was cut and not
    ended by the model.
    """

    document: int
    text: str
    tokens: int
    is_cut: bool


def self_replay(wanted: SelfReplay, report: ReportGenerated = lambda *_: None) -> Made:
    """Sample documents until they have enough tokens, write them to OUTPUT.jsonl, and prepare them.

    Raises BadInput where the settings are not allowed, or where the files at the output are of
    other ones.
    """
    tokenizer, config, prepared_as = _checked(wanted)
    most = _most_tokens(wanted.sampling, config)
    lines = _lines_file(wanted)
    _keep_settings(wanted, tokenizer, most)
    samples = _read(lines)
    _sample(wanted, tokenizer, most, samples, report)
    return Made(
        documents=len(samples),
        tokens=sum(sample.tokens for sample in samples),
        empty=sum(not sample.text.strip() for sample in samples),
        cut=sum(sample.is_cut for sample in samples),
        prepared=prepare(prepared_as),
    )


def _checked(wanted: SelfReplay) -> tuple[Tokenizer, Any, PrepareSettings]:
    prepared_as = PrepareSettings(
        inputs=[str(_lines_file(wanted))],
        tokenizer=wanted.model,
        output=wanted.output,
        kind="text",
        columns={"text": "text"},
        held_out=wanted.held_out,
    )
    faults = [
        *_faults(wanted),
        *faults_of_settings(prepared_as),
        *faults_of_output(Path(wanted.output), holds_out=wanted.held_out > 0),
    ]
    if faults:
        raise BadInput(*faults)
    config = read_config(wanted.model, None, key="MODEL")
    room = max_positions(config)
    asked = (wanted.sampling.max_tokens or 1) + wanted.sampling.prompt_tokens + 1
    if room is not None and asked > room:
        raise BadInput(
            f"--max-tokens and --prompt-tokens make documents of {asked} tokens with their start,"
            f" {wanted.model} has positions for {room}; give fewer"
        )
    return load_tokenizer(wanted.model), config, prepared_as


def _faults(wanted: SelfReplay) -> Iterator[str]:
    sampling = wanted.sampling
    if not 0 < sampling.temperature < math.inf:
        yield (
            f"--temperature is {sampling.temperature:g}, must be above 0; 1 samples what the model"
            " has learned"
        )
    if not 0 < sampling.top_p <= 1:
        yield f"--top-p is {sampling.top_p:g}, must be above 0 and at most 1; 1 leaves nothing out"
    if sampling.prompt_tokens < 0:
        yield f"--prompt-tokens is {sampling.prompt_tokens}, must be 0 or more"


def _most_tokens(sampling: Sampling, config: Any) -> int:
    """The tokens that the model may make of a document."""
    room = max_positions(config)
    usual = _USUAL_TOKENS if room is None else min(_USUAL_TOKENS, room - sampling.prompt_tokens - 1)
    return sampling.max_tokens or usual


def _lines_file(wanted: SelfReplay) -> Path:
    output = Path(wanted.output)
    return output.with_name(f"{output.name}.jsonl")


def _keep_settings(wanted: SelfReplay, tokenizer: Tokenizer, most: int) -> None:
    """Write down what the lines depend on; raises BadInput where there are lines of other
    settings.
    """
    path = _lines_file(wanted).with_suffix(".settings.json")
    now = {
        "version": VERSION,
        "model": wanted.model,
        "tokenizer": tokenizer.fingerprint[:16],
        **asdict(wanted.sampling),
        "max_tokens": most,
    }
    if _lines_file(wanted).exists() and not path.exists():
        raise BadInput(
            f"{_lines_file(wanted)} exists and was not made by this command; remove it, or give"
            " another --output"
        )
    if _lines_file(wanted).exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        faults = [
            f"{key} is {value!r}, and {_lines_file(wanted)} was begun with {then.get(key)!r}; give"
            " that again, or remove the file"
            for key, value in now.items()
            if then.get(key) != value
        ]
        if faults:
            raise BadInput(*faults)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(now, indent=1) + "\n")


def _read(path: Path) -> list[_Sample]:
    """The documents that were written before; a line that was cut off is taken back."""
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with path.open("rb+") as file:
        file.truncate(sum(map(len, whole)))
    return [_Sample(**json.loads(line)) for line in whole]


def _sample(
    wanted: SelfReplay,
    tokenizer: Tokenizer,
    most: int,
    samples: list[_Sample],
    report: ReportGenerated,
) -> None:
    """Append documents until all of them have enough tokens; where that is does not depend on the
    batch.
    """
    tokens = sum(sample.tokens for sample in samples)
    empty_from = len(samples)
    report(len(samples), tokens)
    if tokens >= wanted.tokens:
        return
    writer = _Writer(wanted.model, tokenizer, wanted.sampling, most)
    with _lines_file(wanted).open("a", encoding="utf-8") as file:
        while tokens < wanted.tokens:
            first = len(samples)
            for sample in writer.documents(range(first, first + wanted.batch)):
                if tokens >= wanted.tokens:
                    break
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
                samples.append(sample)
                tokens += sample.tokens
                empty_from = len(samples) if sample.tokens else empty_from
            file.flush()
            if len(samples) - empty_from >= _MOST_EMPTY:
                raise BigmixError(
                    f"{wanted.model} ended each of the last {len(samples) - empty_from:,} documents"
                    " before their first token: it does not write texts by itself; give"
                    " --prompt-tokens 1 or more"
                )
            report(len(samples), tokens)


class _Writer:
    """A model in memory that makes documents up."""

    def __init__(self, model: str, tokenizer: Tokenizer, sampling: Sampling, most: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bf16" if self._device.type == "cuda" else "fp32"
        self._lm = lm = open_whole(model, dtype=dtype, device=self._device)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._ends = _ends(lm.generation_config, tokenizer)
        barred_V = _barred(tokenizer, self._ends, lm.config.vocab_size)
        self._ordinary = np.setdiff1d(np.flatnonzero(~barred_V.numpy()), self._ends)
        self._barred_V = barred_V.to(self._device)
        self._most = most
        # The model's own one may have penalties and truncations: the samples would not be what it
        # has learned.
        lm.generation_config = transformers.GenerationConfig(
            max_new_tokens=most,
            do_sample=False,  # the sampler draws, and leaves one token to choose
            eos_token_id=self._ends,
            pad_token_id=tokenizer.eos_id,
        )

    def documents(self, numbers: range) -> Iterator[_Sample]:
        """The documents of some numbers; what one is does not depend on the others but for
        rounding.
        """
        draws = [
            np.random.default_rng(key_of(self._sampling.seed, "self-replay", n)) for n in numbers
        ]
        prompt_BT = torch.tensor([self._prompt(draw) for draw in draws], device=self._device)
        uniforms_BT = np.stack([draw.random(self._most) for draw in draws])
        sampler = TokenSampler(
            torch.from_numpy(uniforms_BT).to(self._device),
            prompt_BT.shape[1],
            partial(probabilities, self._sampling, self._barred_V),
        )
        with torch.no_grad():
            made_BT = self._lm.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                logits_processor=transformers.LogitsProcessorList([sampler]),
            )
        start = prompt_BT.shape[1] - self._sampling.prompt_tokens
        for number, ids in zip(numbers, made_BT[:, start:].tolist(), strict=True):
            yield self._document(number, ids)

    def _prompt(self, draw: np.random.Generator) -> list[int]:
        """What a document begins with; an end stands for the start where the model has none and
        draws the first token itself.
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
    """The tokens that end a document, by the tokenizer and by the model."""
    named = getattr(generation, "eos_token_id", None)
    own = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_id, *(token for token in own if token is not None)})


def _barred(tokenizer: Tokenizer, ends: Sequence[int], vocabulary: int) -> Tensor:
    """True for ids [V] that are never drawn: special tokens but the ends, and rows of the model
    that are no token.
    """
    barred_V = torch.zeros(vocabulary, dtype=torch.bool)
    barred_V[tokenizer.vocab_size :] = True
    barred_V[[token for token in tokenizer.special_ids if token < vocabulary]] = True
    barred_V[list(ends)] = False
    return barred_V


def probabilities(sampling: Sampling, barred_V: Tensor, logits_BV: Tensor) -> Tensor:
    """The probabilities [B, V] that the next tokens are drawn with, by temperature and top_p;
    barred ids have 0.
    """
    logits_BV = logits_BV.double().masked_fill(barred_V, -torch.inf)
    probabilities_BV = (logits_BV / sampling.temperature).softmax(1)
    if sampling.top_p < 1:
        probabilities_BV = _truncated(probabilities_BV, sampling.top_p)
    return probabilities_BV


def _truncated(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Without the least probable tokens, as long as the others have `top_p` together (Holtzman et
    al., 2020).

    Not transformers' TopPLogitsWarper: of tokens that are equally probable, which are common among
    logits in bf16, it keeps others, and the documents of a seed would change.
    """
    sorted_BV, order_BV = probabilities_BV.sort(1, descending=True)
    before_BV = sorted_BV.cumsum(1) - sorted_BV
    kept_BV = torch.where(before_BV < top_p, sorted_BV, 0.0)
    return torch.zeros_like(probabilities_BV).scatter(1, order_BV, kept_BV)
