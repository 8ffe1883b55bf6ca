"""Averages the weights of models of the same shape.

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

# Keys that may differ between models of the same shape: how they were written and how they are run.
_FREE_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)
_MOST_NAMED = 10
_ROUNDING = 1e-9  # of a sum of weights: 0.33 + 0.56 + 0.11 is a little above 1
# The other files of a model, by their endings.
_COMPANIONS = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})
ReportTensors = Callable[[int], None]  # tensors done


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragedModel:
    """The folder of a model and its weight in the average."""

    folder: Path
    weight: float


def members_of(folders: Sequence[Path], weights: Sequence[float]) -> Sequence[AveragedModel]:
    """The models of an average with their weights: each model after the first has its own, and the
    first has the rest up to 1.

    Raises BadInput where there is not a weight for each, or one is below 0, or their sum is above
    1.
    """
    faults = []
    if len(weights) != len(folders) - 1:
        faults.append(
            f"--weight has {len(weights)} numbers for {len(folders) - 1} models after the base;"
            " give one for each"
        )
    rest = 1 - math.fsum(weights)
    if any(not 0 <= weight <= 1 for weight in weights) or rest < -_ROUNDING:
        listed = ", ".join(f"{weight:g}" for weight in weights)
        faults.append(
            f"--weight is {listed}, each must be from 0 to 1 and their sum at most 1; the base has"
            " the rest"
        )
    if faults:
        raise BadInput(*faults)
    return [
        AveragedModel(folder=folder, weight=weight)
        for folder, weight in zip(folders, [max(rest, 0.0), *weights], strict=True)
    ]


def folder_of(name: str) -> Path:
    """The folder of a model, which is downloaded where the name is one of the hub; raises BadInput
    where there is no such model.
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
    """Write the average of models to a folder, tensor by tensor, with sums in fp32.

    Everything is written to a temporary folder, which is then renamed. Tokenizer and chat template
    are those of the last model, the tuned one. `report` is called with the number of tensors that
    are done. Raises BadInput where the folder exists, and with every difference where the models
    are not of the same shape.
    """
    if output.exists():
        raise BadInput(f"--output {output} exists; give another folder, or remove it")
    with ExitStack() as stack:
        files = [stack.enter_context(closing(WeightFiles(member.folder))) for member in members]
        faults = [*_config_faults(members), *_tokenizer_faults(members), *_tensor_faults(files)]
        if faults:
            raise BadInput(*faults)
        temporary = output.with_name(f".tmp-{output.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = [member.weight for member in members]
        write_shards(temporary, _averages(files, weights, report), shard_bytes)
    _copy_companions(members, temporary)
    (temporary / "README.md").write_text(_card(members, command), encoding="utf-8")
    temporary.rename(output)


def _averages(
    files: Sequence[WeightFiles], weights: Sequence[float], report: ReportTensors
) -> Iterator[tuple[str, Tensor]]:
    for num_done, name in enumerate(files[0].names, 1):
        yield name, weighted([each.read(name) for each in files], weights)
        report(num_done)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors, computed in fp32, in the widest of their dtypes.

    A tensor with all of the weight is returned bit for bit.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    counted = [(t, w) for t, w in zip(tensors, weights, strict=True) if w != 0]
    if len(counted) == 1 or not dtype.is_floating_point:
        return counted[0][0].to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(tensors[0].shape, dtype=precise)
    for tensor, weight in counted:
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
                    f" in that of {member.folder}; only models of the same shape can be averaged"
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
    """A model may have no tokenizer; those of all others must be the same."""
    folders = [m.folder for m in members if (m.folder / "tokenizer.json").is_file()]
    fingerprints = [fingerprint_of(str(folder)) for folder in folders]
    for folder, fingerprint in zip(folders[1:], fingerprints[1:], strict=True):
        if fingerprint != fingerprints[0]:
            yield (
                f"the tokenizer of {folder} ({fingerprint[:12]}) is not that of {folders[0]}"
                f" ({fingerprints[0][:12]}); an id must mean the same in all models, give models"
                " with the same tokenizer"
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
        yield from _integer_faults(first, other)


def _integer_faults(first: WeightFiles, other: WeightFiles) -> Iterator[str]:
    """Tensors of integers, such as the indices of a table, have no average: they must be the
    same.
    """
    for name in sorted(set(first.names) & set(other.names)):
        is_real = "F" in first.describe(name).dtype
        if not is_real and not torch.equal(first.read(name), other.read(name)):
            yield (
                f"{name}, a tensor of integers, which cannot be averaged, differs between"
                f" {first.folder} and {other.folder}"
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _copy_companions(members: Sequence[AveragedModel], folder: Path) -> None:
    """Copy the other files of the last model: configuration, with the dtype of the average,
    tokenizer and chat template.
    """
    last = members[-1].folder
    for path in last.iterdir():
        if path.suffix in _COMPANIONS and ".index." not in path.name:
            shutil.copy2(path, folder / path.name)
    config = transformers.AutoConfig.from_pretrained(last)
    with closing(WeightFiles(folder)) as files:
        config.dtype = files.read(files.names[0]).dtype
    config.save_pretrained(folder)


def _card(members: Sequence[AveragedModel], command: str) -> str:
    rows = [[str(member.folder), f"{member.weight:g}"] for member in members]
    return (
        front_matter(str(members[0].folder))
        + "# An average of models\n\nEach weight is the sum of the models' weights in these parts,"
        " added up in fp32 (WiSE-FT, Wortsman et al., 2022):\n\n"
        + table(("model", "part"), rows)
        + f"\nMade with {versions()}:\n\n    {command}\n"
    )
