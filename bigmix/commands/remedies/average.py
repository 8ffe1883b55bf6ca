"""Folders of models with the same shape go in, the folder of their weighted average comes out.

Averaging a model with what it was tuned from keeps much of what both know: WiSE-FT (Wortsman et
al., "Robust fine-tuning of zero-shot models", 2022); for what tuned language models forget: Lin et
al., "Mitigating the Alignment Tax of RLHF", 2023 (arXiv:2309.06256).
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor

from bigmix.errors import BadInput
from bigmix.model.export import WeightFiles, write_shards
from bigmix.text.tokenizer import fingerprint_of
from bigmix.train.export import front_matter, table, versions

# What may differ between models whose weights mean the same: how they were written and how they are
# run.
_FREE_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)
_MOST_NAMED = 10
_ROUNDING = 1e-9  # of a sum of weights: 0.33, 0.56 and 0.11 are a little above 1
# Files of a model that go with its weights, by their endings.
_COMPANIONS = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
ReportTensors = Callable[[int], None]  # tensors done


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragedModel:
    """The folder of a model and its weight in the average."""

    folder: Path
    weight: float


def members_of(folders: Sequence[Path], weights: Sequence[float]) -> Sequence[AveragedModel]:
    """The members of an average: each model after the first has its own weight, the first one has
    what is left.

    Raises BadInput where that is no average.
    """
    faults = []
    if len(weights) != len(folders) - 1:
        faults.append(
            f"--weight has {len(weights)} numbers for {len(folders) - 1} models after the base;"
            " give one for each"
        )
    left = 1 - math.fsum(weights)
    if any(not 0 <= weight <= 1 for weight in weights) or left < -_ROUNDING:
        said = ", ".join(f"{weight:g}" for weight in weights)
        faults.append(
            f"--weight is {said}, each must be from 0 to 1 and their sum at most 1; the base has"
            " what is left"
        )
    if faults:
        raise BadInput(*faults)
    return [
        AveragedModel(folder=folder, weight=weight)
        for folder, weight in zip(folders, [max(left, 0.0), *weights], strict=True)
    ]


def folder_of(name: str) -> Path:
    """The folder of a model, fetched where it is a name on the hub; raises BadInput where there is
    none.
    """
    if Path(name).is_dir():
        return Path(name)
    wanted = ["*.safetensors", *(f"*{ending}" for ending in _COMPANIONS)]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{name} is no folder, and the hub has no such model ({str(error).splitlines()[0]});"
            " give the folder or the hub name of a model"
        ) from error


def average(
    members: Sequence[AveragedModel],
    output: Path,
    *,
    shard_bytes: int,
    command: str,
    report: ReportTensors = lambda _: None,
) -> None:
    """Write the average of models to a folder, tensor by tensor, in fp32 sums; beside first and
    then in one step.

    Raises BadInput with every difference where the models are not of one shape. The tokenizer is
    that of the last model, the tuned one.
    """
    if output.exists():
        raise BadInput(f"--output {output} exists; give another folder, or remove it")
    with ExitStack() as stack:
        files = [stack.enter_context(closing(WeightFiles(member.folder))) for member in members]
        faults = [*_config_faults(members), *_tokenizer_faults(members), *_tensor_faults(files)]
        if faults:
            raise BadInput(*faults)
        beside = output.with_name(f".tmp-{output.name}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        weights = [member.weight for member in members]
        write_shards(beside, _averages(files, weights, report), shard_bytes)
    _copy_companions(members, beside)
    (beside / "README.md").write_text(_card(members, command), encoding="utf-8")
    beside.rename(output)


def _averages(
    files: Sequence[WeightFiles], weights: Sequence[float], report: ReportTensors
) -> Iterator[tuple[str, Tensor]]:
    for done, name in enumerate(files[0].names, 1):
        yield name, weighted([each.read(name) for each in files], weights)
        report(done)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors in fp32, in the widest of their dtypes; one that weighs all is
    given back bit for bit.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    heard = [(t, w) for t, w in zip(tensors, weights, strict=True) if w != 0]
    if len(heard) == 1 or not dtype.is_floating_point:
        return heard[0][0].to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(tensors[0].shape, dtype=precise)
    for tensor, weight in heard:
        total.add_(tensor.to(precise), alpha=weight)
    return total.to(dtype)


def _config_faults(members: Sequence[AveragedModel]) -> Iterator[str]:
    configs = [_config(member.folder) for member in members]
    for member, config in zip(members[1:], configs[1:], strict=True):
        for key in sorted(configs[0].keys() | config.keys()):
            first, other = configs[0].get(key), config.get(key)
            if first != other and key not in _FREE_KEYS:
                yield (
                    f"{key} is {first!r} in the configuration of {members[0].folder} and {other!r}"
                    f" in that of {member.folder}; only models of one shape can be averaged"
                )


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = transformers.AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{folder} gives no model configuration ({str(error).splitlines()[0]}); give the folder"
            " of a model"
        ) from error
    return found


def _tokenizer_faults(members: Sequence[AveragedModel]) -> Iterator[str]:
    """A model may lie without a tokenizer; two that are there must be the same."""
    known = [m.folder for m in members if (m.folder / "tokenizer.json").is_file()]
    prints = [fingerprint_of(str(folder)) for folder in known]
    for folder, fingerprint in zip(known[1:], prints[1:], strict=True):
        if fingerprint != prints[0]:
            yield (
                f"the tokenizer of {folder} ({fingerprint[:12]}) is not that of {known[0]}"
                f" ({prints[0][:12]}); the same id must mean the same in all models"
            )


def _tensor_faults(files: Sequence[WeightFiles]) -> Iterator[str]:
    first = files[0]
    for other in files[1:]:
        for one, two in ((first, other), (other, first)):
            missing = sorted(set(one.names) - set(two.names))
            if missing:
                yield f"{two.folder} has no {_some(missing)}, which {one.folder} has"
        shapes = [
            f"{name} ({list(mine.shape)} and {list(its.shape)})"
            for name in sorted(set(first.names) & set(other.names))
            if (mine := first.describe(name)).shape != (its := other.describe(name)).shape
        ]
        if shapes:
            yield (
                f"weights have other shapes in {first.folder} than in {other.folder}:"
                f" {_some(shapes)}"
            )
        yield from _whole_number_faults(first, other)


def _whole_number_faults(first: WeightFiles, other: WeightFiles) -> Iterator[str]:
    """Numbers that are no weights, such as the places of a table, have no average: they must be the
    same.
    """
    for name in sorted(set(first.names) & set(other.names)):
        is_real = "F" in first.describe(name).dtype
        if not is_real and not torch.equal(first.read(name), other.read(name)):
            yield (
                f"{name}, which is of whole numbers, differs between {first.folder} and"
                f" {other.folder}"
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _copy_companions(members: Sequence[AveragedModel], beside: Path) -> None:
    """What goes with the last model: configuration, tokenizer, chat template; with the dtype that
    the weights have.
    """
    last = members[-1].folder
    for path in last.iterdir():
        if path.suffix in _COMPANIONS and ".index." not in path.name:
            shutil.copy2(path, beside / path.name)
    config = transformers.AutoConfig.from_pretrained(last)
    with closing(WeightFiles(beside)) as files:
        config.dtype = files.read(files.names[0]).dtype
    config.save_pretrained(beside)


def _card(members: Sequence[AveragedModel], command: str) -> str:
    rows = [[str(member.folder), f"{member.weight:g}"] for member in members]
    return (
        front_matter(str(members[0].folder))
        + "# An average of models\n\nEach weight is the sum of the models' weights in these parts,"
        " added up in fp32 (WiSE-FT, Wortsman et al., 2022):\n\n"
        + table(("model", "part"), rows)
        + f"\nMade with {versions()}:\n\n    {command}\n"
    )
