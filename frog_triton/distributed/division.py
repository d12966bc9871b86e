"""Which rank solves which rows of a layer."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..linalg.rows import local
from ..model.plan import Layer
from .collectives import collective_device

Group = dist.ProcessGroup | Literal[False] | None


class Division:
    """The ranks that draw samples, and how rows are divided among them.

    A rank holds some rows of every layer, its shard, which may be all of them. The
    ranks that hold the same rows (replicas) each solve a part of them.

    Args:
        group: of all ranks.
        places: replica and shard of each rank.
        replica_group: ranks that hold the same rows as this one; None if there are no
            others.

    Attributes:
        group: of all ranks.
        replica_group: as above.
        rank: this rank's number in the group.
        size: how many ranks there are.
        replicas: how many ranks hold the same rows.
        shards: how many parts a layer's rows are held in.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        places: Sequence[tuple[int, int]],
        replica_group: dist.ProcessGroup | None,
    ) -> None:
        self.group = group
        self.replica_group = replica_group
        self.rank, self.size = group.rank(), group.size()
        self._places = places
        self.replicas = 1 + max(replica for replica, _ in places)
        self.shards = 1 + max(shard for _, shard in places)

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> Division:
        """Every rank holds all rows."""
        return cls(group, [(rank, 0) for rank in range(group.size())], group)

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh, placements: Sequence[Placement]) -> Division:
        """Rows held as the placements say: shards, replicas, or replicas of shards."""
        group: dist.ProcessGroup | None
        if mesh.ndim == 1:
            group = mesh.get_group()
        elif mesh.size() == dist.get_world_size():
            group = dist.group.WORLD
        else:
            ranks = sorted(mesh.mesh.flatten().tolist())
            group = dist.new_group(ranks, use_local_synchronization=True)
        sharded = [isinstance(placement, Shard) for placement in placements]
        assert group is not None
        places = []
        for rank in range(group.size()):
            at = (mesh.mesh == dist.get_global_rank(group, rank)).nonzero()[0].tolist()
            replica = [i for i, shard in zip(at, sharded, strict=True) if not shard]
            shard = [i for i, shard in zip(at, sharded, strict=True) if shard]
            places.append((sum(replica), sum(shard)))
        replicated = [axis for axis, shard in enumerate(sharded) if not shard]
        return cls(group, places, mesh.get_group(replicated[0]) if replicated else None)

    def held(self, layer: Layer, rank: int) -> range:
        """Which of a layer's rows a rank holds: `torch.chunk`'s division of units."""
        _, shard = self._places[rank]
        rows, unit = layer.geometry.rows, layer.unit
        chunk = -(-(rows // unit) // self.shards) * unit
        start = min(shard * chunk, rows)
        return range(start, min(start + chunk, rows))

    def solved(self, layer: Layer, rank: int) -> range:
        """Which of a layer's rows a rank solves: a part of those it holds."""
        replica, _ = self._places[rank]
        held = self.held(layer, rank)
        n, replicas = len(held), self.replicas
        return held[n * replica // replicas : n * (replica + 1) // replicas]

    def mine(self, layer: Layer) -> range:
        """Which of a layer's rows this rank solves."""
        return self.solved(layer, self.rank)

    def peers(self) -> list[int]:
        """Numbers, in `group`, of the ranks of `replica_group`."""
        if self.replica_group is None:
            return [self.rank]
        ranks = dist.get_process_group_ranks(self.replica_group)
        return [dist.get_group_rank(self.group, rank) for rank in ranks]

    def device(self, layers: Sequence[Layer]) -> torch.device:
        """That collectives over all ranks run on."""
        device = local(layers[0].weight).device if layers else torch.device("cpu")
        return collective_device(self.group, device)


def find_division(
    layers: Iterable[Layer],
    names: Mapping[nn.Parameter, str],
    process_group: Group,
) -> Division | None:
    """How the rows of these layers are divided among ranks.

    Args:
        layers: all that are preconditioned.
        names: of the model's parameters.
        process_group: the user's; None for the default group, False for none.

    Returns:
        The division, or None where there is one rank only.

    Raises:
        ValueError: see `check_placements`.
    """
    found = check_placements(layers, names, process_group)
    if found is not None:
        mesh, placements = found
        return None if mesh.size() == 1 else Division.of_mesh(mesh, placements)
    if process_group is False or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None
    return None if group.size() == 1 else Division.of_group(group)


Placed = tuple[DeviceMesh, tuple[Placement, ...]]


def check_placements(
    layers: Iterable[Layer],
    names: Mapping[nn.Parameter, str],
    process_group: Group,
) -> Placed | None:
    """Mesh and placements that all preconditioned parameters share.

    Args:
        layers: all that are preconditioned.
        names: of the model's parameters.
        process_group: the user's.

    Returns:
        None if the parameters are plain tensors.

    Raises:
        ValueError: a parameter's rows are not whole on some rank, parameters are
            placed in different ways, or the process group contradicts them.
    """
    layers = list(layers)
    params = list(itertools.chain.from_iterable(layer.params for layer in layers))
    first_axes = {layer.weight: layer.axes.rows[0] for layer in layers}
    found = {param: _placed(param, first_axes.get(param, 0)) for param in params}
    for param, placed in found.items():
        if placed is not None and not _rows_are_whole(placed[1]):
            raise ValueError(
                f"{names[param]} has placements {placed[1]}, but FROG needs whole rows "
                "on a rank: Shard(0), Replicate(), or Replicate() x Shard(0). Shard it "
                "on dimension 0, fully_shard's default, or leave it to the fallback "
                f"with exclude=[{names[param]!r}]"
            )
    first = params[0] if params else next((p for p in names if _placed(p)), None)
    placed = None if first is None else found.get(first, _placed(first))
    for param, other in found.items():
        if other != placed:
            assert first is not None
            raise ValueError(
                f"{names[param]} is {_words(other)}, but {names[first]} is "
                f"{_words(placed)}: FROG needs all that it preconditions on one mesh. "
                "Call fully_shard on the whole model with that mesh, or exclude one"
            )
    if first is not None and placed is not None and process_group is not None:
        raise ValueError(
            f"process_group does not go with sharded parameters ({names[first]}): "
            "their mesh says which ranks train together; leave it out"
        )
    if placed is not None and not _rows_are_whole(placed[1]):
        return None  # nothing is preconditioned
    return placed


def check_parallelism(
    model: nn.Module, layers: Iterable[Layer], names: Mapping[nn.Parameter, str]
) -> None:
    """Raise ValueError for tensor parallelism of layers that are preconditioned.

    Its placements may be those of ``fully_shard``, but its ranks have the same batch
    and see only parts of what goes through a layer.

    Args:
        model: which modules `fully_shard` has sharded.
        layers: all that are preconditioned.
        names: of the model's parameters.
    """
    sharded = {
        param
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for param in module.parameters()
    }
    params = list(itertools.chain.from_iterable(layer.params for layer in layers))
    split = [
        param
        for param in params
        if isinstance(param, DTensor)
        and (param not in sharded or sum(map(_splits, param.placements)) > 1)
    ]
    if not split:
        return
    taken = [names[param] for param in split]
    patterns = _patterns(taken, {names[param] for param in params} - {*taken})
    raise ValueError(
        f"{taken[0]} is {_words(_placed(split[0]))}, as tensor parallelism does it, "
        "not fully_shard alone: its ranks see parts of a layer, and FROG cannot train "
        "that. Shard by fully_shard in place of parallelize_module or tp_plan, or "
        f"leave these to the fallback with exclude={patterns}"
    )


def _splits(placement: Placement) -> bool:
    return not isinstance(placement, Replicate)


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of a tensor."""
    return isinstance(tensor, DTensor) and any(map(_splits, tensor.placements))


def _patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Shell patterns of names, with a star for numbers where no other name matches."""
    found: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        wide = any(fnmatch.fnmatchcase(other, pattern) for other in others)
        found[name if wide else pattern] = None
    return list(found)


def _placed(param: Tensor, rows: int = 0) -> Placed | None:
    """Mesh and placements, as if the dimension that counts rows were the first."""
    if not isinstance(param, DTensor):
        return None
    placements = (
        Shard(0) if rows and placement == Shard(rows) else placement
        for placement in param.placements
    )
    return param.device_mesh, tuple(placements)


def _rows_are_whole(placements: tuple[Placement, ...]) -> bool:
    shard, replicate = Shard(0), Replicate()
    return placements in ((shard,), (replicate,), (replicate, shard))


def _words(placed: Placed | None) -> str:
    if placed is None:
        return "a plain tensor"
    return f"placed as {placed[1]} on {placed[0]}"
