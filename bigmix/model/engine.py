"""The DeepSpeed engine of a model that is trained, and of one that is not.

The only module that imports deepspeed.
"""

import functools
import gc
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from bigmix.cluster.collectives import Cluster, export_world
from bigmix.cluster.world import World, free_port
from bigmix.model.ds_config import zero_stage
from bigmix.model.zero_partitions import ZeroState

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """Settings of the optimizer; the learning rate is set before every step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def join(world: World) -> Cluster:
    """Join the process group of the job and select this rank's device; a collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device_of(world).type == "cpu":
        _use_gloo_alone()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    else:
        torch.cuda.set_device(world.local_rank)
    if world.size == 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
        # torchrun's store is at torchrun's port; a rank that looked for it at this one would wait
        # forever.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    export_world(world)
    backend = "gloo" if device_of(world).type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return Cluster(world)


def end_process_group() -> None:
    """Undo `join` in a process that may join again: DeepSpeed keeps groups of its own, which end
    with the process group.
    """
    deepspeed.comm.destroy_process_group()


def device_of(world: World) -> torch.device:
    """The device of a rank: its GPU where there are GPUs, else the CPU."""
    # DeepSpeed decides: DS_ACCELERATOR=cpu keeps a job off the GPUs of its machine.
    if get_accelerator().device_name() == "cuda":
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def _use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling a shared-memory collective on a CPU, so that no compiler is
    needed.

    It also keeps DeepSpeed from trying all its operators with the compiler when the first of them
    is looked up.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _import_muon() -> None:
    """Import an optimizer of DeepSpeed that bigmix never uses, before DeepSpeed does so for each
    engine.

    The module compiles its functions where it defines them, for which torch would import its
    compiler: seconds of each start.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:
        return  # a version of DeepSpeed without it
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


class _SeenByTransformers:
    """What transformers reads of a DeepSpeed configuration while it makes a model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextmanager
def sharded_construction(config: Mapping[str, Any]) -> Iterator[None]:
    """A context in which transformers makes each parameter as a shard under ZeRO-3, so that no rank
    ever holds a whole model.
    """
    if zero_stage(config) < 3:
        yield
        return
    # transformers keeps a weak reference: `seen` must live as long as the context.
    seen = _SeenByTransformers(dict(config))
    set_hf_deepspeed_config(seen)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class Engine:
    """The model under ZeRO: one `forward`, `backward` and `step_micro_batch` for each micro-batch.

    With `average_decay` it keeps an average of the weights over the steps, which evaluations and
    the export use. `zero_state` is what this rank holds of weights, average and moments: after a
    step that was not skipped call its `update_average`; checkpoints read and fill it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        adamw: AdamW,
        average_decay: float | None = None,
    ) -> None:
        _gather_layers_whole(model, config)
        optimizer = _optimizer(model, config, adamw)
        _import_muon()
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config)
        )
        self._skipped = 0
        self.zero_state = ZeroState(
            self._engine.optimizer,
            {id(parameter): name for name, parameter in model.named_parameters()},
            stage=zero_stage(config),
            rank=self._engine.global_rank,
            decay=average_decay,
        )
        gc.enable()  # off since the rank started: by now it has imported all that it needs

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    @property
    def module(self) -> Any:
        """The wrapped model; its weights may be shards."""
        return self._engine.module

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's loss of a micro-batch: objective and sums."""
        loss: tuple[Tensor, Tensor] = self._engine(batch)
        return loss

    def backward(self, objective: Tensor) -> None:
        """Add the micro-batch's gradient; ZeRO then holds the mean over ranks of the sum over
        micro-batches.
        """
        # The coefficients are already divided by the counts of the whole step: DeepSpeed must not
        # divide by the number of micro-batches as well.
        self._engine.backward(objective, scale_wrt_gas=False)

    def step_micro_batch(self, lr: float) -> None:
        """End a micro-batch; the last one of the step updates the weights."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def gradient_norm(self) -> Tensor | float:
        """The norm of the last step's gradient before clipping, over all ranks."""
        norm: Tensor | float = self._engine.get_global_grad_norm()
        return norm

    def was_skipped(self) -> bool:
        """Whether the last step was skipped on all ranks because a gradient was not finite."""
        skipped = int(self._engine.skipped_steps)
        was_skipped, self._skipped = skipped > self._skipped, skipped
        return was_skipped

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the weights are their average where one is kept; nothing may be
        trained or saved inside. A collective.
        """
        if not self.zero_state.keeps_average:
            yield
            return
        assert not self.zero_state.is_averaged, "the weights are their average already"
        self.zero_state.exchange_average()
        yield
        # Not after an error, which other ranks may not have: this rank would wait for them.
        self.zero_state.exchange_average()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which forwards keep no gradient, dropout is off, and the weights are those
        of `averaged`. A collective.
        """
        self._engine.eval()
        try:
            with self.averaged(), torch.no_grad():
                yield
                # After the last forward, ZeRO-3 is fetching weights for the backward that follows
                # in training; a weight that is being fetched cannot be gathered by others.
                self._engine.empty_partition_cache()
        finally:
            self._engine.train()

    def close(self) -> None:
        """Release what DeepSpeed holds beyond the life of the engine, which is then unusable."""
        self._engine.destroy()

    def sizes(self) -> dict[str, int]:
        """The bytes of every weight in the model's dtype, by name: tied weights once, and buffers
        that are part of the state.
        """
        return {
            # Under ZeRO-3 a parameter is a flat shard; ds_numel is the size of the whole.
            name: getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
            for name, tensor in self._tensors().items()
        }

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The named weights in host memory: whole on the first rank, none on the others. A
        collective.
        """
        tensors, found = self._tensors(), {}
        zero = self._engine.optimizer
        is_sharded = self._engine.zero_optimization_stage() == 3
        if is_sharded:
            zero.checkpoint_event_prologue()
        for name in names:
            with deepspeed.zero.GatheredParameters([tensors[name]], enabled=is_sharded):
                if self._engine.global_rank == 0:
                    found[name] = tensors[name].detach().to("cpu", copy=True)
        if is_sharded:
            # Gathers the small parameters again, which ZeRO keeps whole on every rank.
            zero.checkpoint_event_epilogue()
        return found

    def _tensors(self) -> dict[str, Tensor]:
        module = self._engine.module
        kept = module.state_dict().keys()
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
        return dict(module.named_parameters()) | buffers

    def peak_gib(self) -> float:
        """The largest device memory in use so far, in GiB; on a CPU the largest resident memory of
        this process.
        """
        if self.device.type == "cuda":
            return float(get_accelerator().max_memory_allocated()) / 2**30
        import resource  # absent on Windows, where no GPU-less run is supported

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def release_memory() -> None:
    """Free what engines that are no longer used have left behind, so that the next one has room and
    counts its own peak.
    """
    # ZeRO-3 pushes each module that begins its forward and never removes the outermost one.
    stack = getattr(parameter_offload, "FWD_MODULE_STACK", None)
    if isinstance(stack, list):
        stack.clear()
    _clear_caches_of_deepspeed()
    gc.collect()  # engines, models and their hooks refer to one another
    if get_accelerator().device_name() == "cuda":
        get_accelerator().empty_cache()
        get_accelerator().reset_peak_memory_stats()


def _clear_caches_of_deepspeed() -> None:
    """Clear the caches of methods, which hold the model among their arguments."""
    for found in gc.get_objects():
        is_cache = isinstance(found, functools._lru_cache_wrapper)
        if is_cache and str(getattr(found, "__module__", "")).startswith("deepspeed"):
            found.cache_clear()


class InferenceEngine:
    """A model that is never trained: sharded under ZeRO-3 like the trained one, else whole on each
    rank.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
        self._is_sharded = zero_stage(config) == 3
        self.device = device
        self.module: Any = model
        if self._is_sharded:
            keys = dict(config)
            # There is no optimizer to offload, but DeepSpeed would require one.
            keys["zero_optimization"] = {
                key: value
                for key, value in keys["zero_optimization"].items()
                if key != "offload_optimizer"
            }
            _gather_layers_whole(model, config)
            model, *_ = deepspeed.initialize(model=model, config=keys)
        else:
            model.to(device)
        model.eval()
        self._run = model
        gc.enable()  # as in Engine

    def forward(self, *inputs: Any) -> Any:
        """The model's output, without gradient; a collective where it is sharded."""
        with torch.no_grad():
            return self._run(*inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which parts of the model that are called directly keep no gradient."""
        with torch.no_grad():
            yield

    @contextmanager
    def gathered(self, part: nn.Linear) -> Iterator[nn.Linear]:
        """A context in which a part of the model has its whole weights; a collective where it is
        sharded.
        """
        weights = list(part.parameters())
        with deepspeed.zero.GatheredParameters(weights, enabled=self._is_sharded):
            yield part


Evaluable: TypeAlias = Engine | InferenceEngine
"""What an evaluation can run: `forward` inside `evaluating`, with tensors on `device`."""


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are shards (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The whole weights of a model one after another, each valid until the next one is read; a
    collective.
    """
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            yield name, parameter.data


def _gather_layers_whole(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Let ZeRO-3 gather the weights of a layer together, and reduce its gradients together.

    By default DeepSpeed does so for each module inside, which costs the host more time than small
    layers take to compute. A DeepSpeed file with `leaf_module` overrides this.
    """
    if zero_stage(config) < 3 or "leaf_module" in config["zero_optimization"]:
        return
    named = (getattr(module, "_no_split_modules", None) or () for module in model.modules())
    layers = sorted({name for names in named for name in names})
    if layers:
        set_z3_leaf_modules(model, layers, raise_if_not_found=False)


def _optimizer(model: nn.Module, config: Mapping[str, Any], adamw: AdamW) -> Any:
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        # Under ZeRO-3 a parameter is a flat shard; ds_shape is the shape of the whole.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decay if len(shape) >= 2 else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": adamw.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": 0.0, "betas": adamw.betas, "eps": adamw.eps}
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    offloads = offload.get("device", "none") != "none"
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        # Compiled at first use; several times faster on a CPU than torch's.
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    on_gpu = get_accelerator().device_name() == "cuda" and not offloads
    return torch.optim.AdamW(groups, fused=on_gpu, **options)
