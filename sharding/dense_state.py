"""Weights and Adam moments of ZeRO's flat partitions, by parameter name.

DeepSpeed keeps a rank's fp32 weights in flat tensors. What lies where depends on the stage; this
file alone knows. Shape legend: W ranks, P elements of a rank's partition.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: in the concatenation of all partitions, or (ZeRO 3) in each."""

    name: str
    shape: torch.Size
    offset: int
    length: int
    """Elements at `offset`; under ZeRO 3 a rank's share, padding included."""


@dataclass(frozen=True)
class FlatGroup:
    """One flat partition of this rank and the parameters that it and its peers hold."""

    master: Tensor
    """This rank's fp32 weights; also what the optimizer's state is keyed by."""
    slots: tuple[Slot, ...]
    rank: int
    world_size: int
    sliced: bool
    """Every parameter is cut over the ranks (ZeRO 3), not their concatenation (ZeRO 1 and 2)."""

    def whole(self, local: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of each parameter from this rank's flat tensor. Collective."""
        flat = local.detach().float().reshape(-1)
        gathered = flat.new_empty(self.world_size, flat.numel())
        if self.world_size > 1:
            dist.all_gather_into_tensor(gathered.view(-1), flat.contiguous())
        else:
            gathered[0] = flat
        for slot in self.slots:
            if self.sliced:
                values = gathered[:, slot.offset : slot.offset + slot.length].reshape(-1)
                values = values[: slot.shape.numel()]
            else:
                values = gathered.view(-1)[slot.offset : slot.offset + slot.length]
            yield slot.name, values.reshape(slot.shape).clone()

    def part(self, full: Mapping[str, Tensor]) -> Tensor:
        """This rank's flat tensor [P] from full tensors; parameters not given are zeros."""
        size = self.master.numel()
        flat = self.master.new_zeros(size if self.sliced else size * self.world_size)
        for slot in self.slots:
            if slot.name not in full:
                continue
            values = full[slot.name].to(flat).reshape(-1)
            if self.sliced:
                padded = flat.new_zeros(slot.length * self.world_size)
                padded[: values.numel()] = values
                values = padded[self.rank * slot.length : (self.rank + 1) * slot.length]
            flat[slot.offset : slot.offset + slot.length] = values
        return flat if self.sliced else flat[self.rank * size : (self.rank + 1) * size]


def flat_groups(engine: "DeepSpeedEngine", stage: int) -> list[FlatGroup]:
    """The flat partitions of an engine."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if stage == 0:
        return [
            FlatGroup(p, (Slot(name, p.shape, 0, p.numel()),), 0, 1, sliced=False)
            for name, p in engine.module.named_parameters()
        ]
    optimizer = engine.optimizer
    if stage == 3:
        return [
            FlatGroup(master, _slots(group, names, sliced=True), rank, world_size, sliced=True)
            for master, group in zip(
                optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
            )
        ]
    return [
        FlatGroup(master, _slots(group, names, sliced=False), rank, world_size, sliced=False)
        for master, group in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            strict=True,
        )
    ]


def publish_weights(engine: "DeepSpeedEngine", stage: int) -> None:
    """Make the forward use what was written into the flat partitions. Collective."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        optimizer._partition_all_parameters()  # drop gathered copies of the old weights
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _slots(
    group: list[nn.Parameter], names: Mapping[int, str], *, sliced: bool
) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    offset = 0
    parameter: Any  # DeepSpeed hangs its bookkeeping on parameters
    for parameter in group:
        shape = torch.Size(parameter.ds_shape) if sliced else parameter.shape
        length = parameter.partition_numel() if sliced else parameter.numel()
        slots.append(Slot(names[id(parameter)], shape, offset, length))
        offset += length
    return tuple(slots)
