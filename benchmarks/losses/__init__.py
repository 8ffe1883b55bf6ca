"""Implementations of the loss: a module for each, with a `CONTESTANT`, and what it needs installed.

Unsloth's is left out: it needs datasets below 5 and a transformers older than ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """What an implementation needs.

    title: its name in the table
    imported: the module that must be importable
    distribution: the package whose version is reported
    install: the arguments of `pip install`
    """

    title: str
    imported: str = "torch"
    distribution: str = "torch"
    install: str = "torch"


OURS, NAIVE = "bigmix", "naive"
ALL = {
    OURS: Package(title="bigmix", imported="bigmix", distribution="bigmix", install="."),
    NAIVE: Package(title="torch, naive"),
    "naive_compiled": Package(title="torch, naive compiled"),
    "torch_builtin": Package(title="torch linear_cross_entropy"),
    "torch_compact": Package(title="torch linear_cross_entropy, compact"),
    "torchtune": Package(
        title="torchtune",
        imported="torchtune",
        distribution="torchtune",
        install="torchtune torchao==0.9.0",
    ),
    "trl": Package(title="TRL", imported="trl", distribution="trl", install="trl"),
    "liger": Package(
        title="Liger",
        imported="liger_kernel",
        distribution="liger-kernel",
        install="liger-kernel",
    ),
    "liger_algorithm": Package(title="Liger's algorithm, in torch"),
    "cce": Package(
        title="CCE",
        imported="cut_cross_entropy",
        distribution="cut-cross-entropy",
        install="cut-cross-entropy",
    ),
    "deepspeed": Package(
        title="DeepSpeed tiled",
        imported="deepspeed",
        distribution="deepspeed",
        install="deepspeed",
    ),
}
