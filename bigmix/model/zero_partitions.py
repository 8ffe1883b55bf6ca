"""Reads and writes what this rank holds in DeepSpeed's ZeRO optimizer.

ZeRO keeps the fp32 weights and Adam's moments in flat tensors. Which elements of which parameter
lie where in them depends on the stage and on the number of ranks; here each piece is described by
its parameter alone, so that another number of ranks can find it again.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bigmix.runs.state_file import MOMENTS, FlatState, ParameterPiece

_EXCHANGED = 1 << 24  # elements exchanged at a time, to bound the memory that it needs


class ZeroState:
    """The flat tensors of one rank, at any ZeRO stage.

    `names` are the names of the parameters by their id(). `optimizer` is DeepSpeed's wrapper, whose
    attributes are private to DeepSpeed and read only here. With `decay` an exponential moving
    average of the weights is kept next to them.
    """

    def __init__(
        self,
        optimizer: Any,
        names: Mapping[int, str],
        *,
        stage: int,
        rank: int,
        decay: float | None = None,
    ) -> None:
        self._zero = optimizer
        self._names = names
        self._stage = stage
        self._rank = rank
        self._decay = decay
        self._num_steps = 0  # of Adam
        self._averages: list[Tensor] = []
        self._is_averaged = False
        if decay is not None:
            self._averages = [weights.detach().clone() for weights in self._weights()]

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the weights is kept."""
        return self._decay is not None

    @property
    def is_averaged(self) -> bool:
        """Whether the weights have changed places with their average."""
        return self._is_averaged

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the average, after a step that has changed the weights.

        Step t has a decay of min(decay, (1 + t) / (10 + t)), as in TensorFlow's
        ExponentialMovingAverage: the average is a mean of real weights at any time, and the model
        that the run began with leaves it within some steps.
        """
        if self._decay is None:
            return
        self._num_steps += 1
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        for average, weights in zip(self._averages, self._weights(), strict=True):
            average.lerp_(weights.detach(), 1 - decay)

    @torch.no_grad()
    def exchange_average(self) -> None:
        """Exchange weights and average, bit for bit, and update the weights of the model; a
        collective.
        """
        if self._stage == 3:
            self._zero._partition_all_parameters()
        for index, (average, weights) in enumerate(
            zip(self._averages, self._weights(), strict=True)
        ):
            _exchange(average, weights.detach())
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._show_weights()
        self._is_averaged = not self._is_averaged

    def flats(self) -> Iterator[FlatState]:
        """Each flat tensor with its average and its moments, which are zero before the first step;
        valid until the next one is read.
        """
        assert not self._is_averaged, "a checkpoint is of the weights and not of their average"
        return self._read_flats()

    def _read_flats(self) -> Iterator[FlatState]:
        for index, weights in enumerate(self._weights()):
            self._swap_in(index)
            yield self._flat(index, weights)
            self._release(index)

    @torch.no_grad()
    def put_back(self, fill: Callable[[FlatState], int]) -> None:
        """Let `fill` write the weights and moments of each flat tensor, and update the weights of
        the model; a collective.

        `fill` returns the number of steps that Adam has taken.
        """
        if self._stage == 3:
            self._zero._partition_all_parameters()
        for index, weights in enumerate(self._weights()):
            self._swap_in(index)
            flat = self._flat(index, weights)
            step = fill(flat)
            self._num_steps = max(self._num_steps, step) if index else step
            self._zero.optimizer.state[weights] = {
                "step": self._step_value(weights, step),
                **flat.moments,
            }
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            self._swap_out(index)
        if self._stage < 3:
            # DeepSpeed's view of a parameter's moments is of the tensors that exist at its first
            # step; it must see the new ones.
            self._zero._lazy_init_hp_params_optimizer_state()
        self._show_weights()

    def _show_weights(self) -> None:
        """Copy the fp32 weights into the model."""
        if self._stage == 3:
            # Gathers the small parameters that ZeRO keeps whole on every rank.
            self._zero._post_step(set())
        else:
            self._zero.update_lp_params()

    def _weights(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        # ZeRO-1 in bf16 with fp32 accumulation is another class of DeepSpeed, with another name for
        # the same tensors.
        own = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return list(own if own is not None else self._zero.fp32_groups_flat_partition)

    def _flat(self, index: int, weights: Tensor) -> FlatState:
        state = self._zero.optimizer.state.get(weights) or {
            key: torch.zeros_like(weights) for key in MOMENTS
        }
        pieces = self._pieces_of_stage_3(index) if self._stage == 3 else self._pieces(index)
        return FlatState(
            pieces=tuple(pieces),
            weights=weights.detach(),
            moments={key: state[key].detach() for key in MOMENTS},
            step=int(state.get("step", 0)),
            average=self._averages[index] if self._averages else None,
        )

    def _pieces_of_stage_3(self, index: int) -> Iterator[ParameterPiece]:
        """The pieces under ZeRO-3, which cuts every parameter into as many slices as there are
        ranks; the last ones may be padding.
        """
        for parameter in self._zero.fp16_groups[index]:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._rank * size
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                name = self._names[id(parameter)]
                yield ParameterPiece(name=name, start=start, count=count, offset=offset)

    def _pieces(self, index: int) -> Iterator[ParameterPiece]:
        """The pieces under ZeRO-1 and 2, which lay the parameters of a group end to end and cut the
        whole into as many slices as there are ranks.
        """
        groups = getattr(self._zero, "bit16_groups", None)
        for parameter in (groups if groups is not None else self._zero.bf16_groups)[index]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield ParameterPiece(
                    name=self._names[id(parameter)],
                    start=mapping.lp_fragment_address.start,
                    count=mapping.lp_fragment_address.numel,
                    offset=mapping.hp_fragment_address.start,
                )

    def _step_value(self, weights: Tensor, step: int) -> Tensor | int:
        """Adam's count of steps in the form in which the optimizer keeps it."""
        optimizer = self._zero.optimizer
        if not isinstance(optimizer, torch.optim.AdamW):
            return step
        device = weights.device if optimizer.defaults["fused"] else torch.device("cpu")
        return torch.tensor(float(step), device=device)

    def _is_swapped(self, index: int) -> bool:
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(index))

    def _swap_in(self, index: int) -> None:
        if self._is_swapped(index):
            self._zero._optimizer_states_and_gradient_swap_in(index)

    def _swap_out(self, index: int) -> None:
        if self._is_swapped(index):
            self._zero._optimizer_states_and_gradient_swap_out(index)

    def _release(self, index: int) -> None:
        if self._is_swapped(index):
            self._zero._release_swap_buffers(index)


def _exchange(one: Tensor, other: Tensor) -> None:
    parts = zip(torch.split(one, _EXCHANGED), torch.split(other, _EXCHANGED), strict=True)
    for own, its in parts:
        held = own.clone()
        own.copy_(its)
        its.copy_(held)
