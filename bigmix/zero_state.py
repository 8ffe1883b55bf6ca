"""DeepSpeed's ZeRO optimizer goes in; out comes what this rank holds of weights and moments, with the place of every parameter in it.

ZeRO keeps fp32 weights and the moments of Adam in flat tensors. Which elements of which parameter lie where in them depends
on the stage and on the number of ranks; here that is told in terms of the parameters alone, so that another number of
ranks can find them again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Elements [start, start + count) of a parameter, which lie from `offset` on in a flat tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatState:
    """A flat tensor of fp32 weights [N] with its moments [N], the steps that Adam has taken, and what lies where.

    Elements that no piece covers are padding.
    """

    pieces: tuple[Piece, ...]
    weights: Tensor
    moments: Mapping[str, Tensor]
    step: int


class ZeroState:
    """The flat tensors of one rank, whatever the stage.

    `names` gives the name of each parameter by its id. `optimizer` is the one that DeepSpeed has wrapped: its attributes
    are DeepSpeed's own and are read here alone.
    """

    def __init__(self, optimizer: Any, names: Mapping[int, str], *, stage: int, rank: int) -> None:
        self._zero = optimizer
        self._names = names
        self._stage = stage
        self._rank = rank

    def flats(self) -> Iterator[FlatState]:
        """Each flat tensor with its moments, zero before the first step; valid until the next one is asked for."""
        for index, weights in enumerate(self._weights()):
            self._swap_in(index)
            yield self._flat(index, weights)
            self._release(index)

    @torch.no_grad()
    def put_back(self, fill: Callable[[FlatState], int]) -> None:
        """Let `fill` write weights and moments of each flat tensor and say how many steps Adam has taken; a collective.

        The weights of the model follow.
        """
        if self._stage == 3:
            self._zero._partition_all_parameters()
        for index, weights in enumerate(self._weights()):
            self._swap_in(index)
            flat = self._flat(index, weights)
            self._zero.optimizer.state[weights] = {
                "step": self._step_value(weights, fill(flat)),
                **flat.moments,
            }
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            self._swap_out(index)
        if self._stage == 3:
            # Gathers the small parameters that ZeRO keeps whole on every rank.
            self._zero._post_step(set())
        else:
            # DeepSpeed's own view of each parameter's moments is of the tensors that are there at its first step.
            self._zero._lazy_init_hp_params_optimizer_state()
            self._zero.update_lp_params()

    def _weights(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        # ZeRO-1 in bf16 with fp32 accumulation is another class of DeepSpeed's, with another name for the same.
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
        )

    def _pieces_of_stage_3(self, index: int) -> Iterator[Piece]:
        """ZeRO-3 cuts every parameter into as many slices as there are ranks; the last ones may be padding."""
        for parameter in self._zero.fp16_groups[index]:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._rank * size
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                name = self._names[id(parameter)]
                yield Piece(name=name, start=start, count=count, offset=offset)

    def _pieces(self, index: int) -> Iterator[Piece]:
        """ZeRO-1 and 2 lay all parameters of a group end to end and cut that into as many slices as there are ranks."""
        groups = getattr(self._zero, "bit16_groups", None)
        for parameter in (groups if groups is not None else self._zero.bf16_groups)[index]:
            place = parameter._hp_mapping
            if place is not None:
                yield Piece(
                    name=self._names[id(parameter)],
                    start=place.lp_fragment_address.start,
                    count=place.lp_fragment_address.numel,
                    offset=place.hp_fragment_address.start,
                )

    def _step_value(self, weights: Tensor, step: int) -> Tensor | int:
        """Adam's count of steps in the form that the optimizer keeps it."""
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
