"""What ranks that train one model together do in a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..capture.capture import SampleCapture
from ..capture.sampling import counter_key
from ..linalg.numbers import Numbers
from ..linalg.rows import local
from ..model.plan import Layer
from ..step import LayerStep, Samples, no_samples
from ..unhooked import Known
from ..update import Solved, advance_momentum
from . import collectives, directions
from .division import Division, is_split
from .samples import SampleExchange


class Ranks:
    """Several ranks: a step's communication. See `World` for all methods.

    Args:
        division: of the rows.
    """

    alone = False

    def __init__(self, division: Division) -> None:
        self.division = division
        self._exchange = SampleExchange(division)
        self._verified = False
        self._row_bytes: dict[str, int] = {}
        self._gathers = 0

    @property
    def group(self) -> dist.ProcessGroup:
        """Of all ranks."""
        return self.division.group

    @property
    def leads(self) -> bool:
        """Whether this is the first rank."""
        return self.division.rank == 0

    def share(self, sample_size: int, seed: int) -> tuple[int, int]:
        """This rank's part of the samples, from a seed of its own."""
        size, rank = self.division.size, self.division.rank
        share = sample_size // size + (rank < sample_size % size)
        return share, counter_key(seed, rank)

    def rows_here(self, layer: Layer) -> int:
        """How many rows of a layer this rank solves."""
        return len(self.division.mine(layer))

    def counted(self, layer: Layer) -> slice:
        """Which of the rows held here this rank solves."""
        mine = self.division.mine(layer)
        first = self.division.held(layer, self.division.rank).start
        return slice(mine.start - first, mine.stop - first)

    def changed(self) -> None:
        """All is to be compared again."""
        self._verified = False

    def verify(
        self,
        settings: Callable[[], dict[str, Any]],
        groups: Iterable[Mapping[str, Any]],
        problem: str | None,
    ) -> None:
        """Compare names and values of settings, and a sum over gradients."""
        if self._verified:
            return
        told = {**settings(), "what is wrong with gradients": problem}
        names = {name: repr(value) for name, value in told.items()}
        theirs: list[Any] = [None] * self.division.size
        total = 0  # of the bits of gradients that should be the same on all ranks
        if self.division.shards == 1 and problem is None:
            params = [p for group in groups for p in group["params"]]
            grads = [p.grad for p in params if p.grad is not None and not is_split(p)]
            total = sum(int(_checksum(local(grad))) for grad in grads)
        dist.all_gather_object(theirs, (names, total), group=self.division.group)
        first, first_total = theirs[0]
        for rank, (other, _) in enumerate(theirs):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise RuntimeError(
                        f"ranks 0 and {rank} differ in {name}: {first.get(name)} and "
                        f"{other.get(name)}; build model and FROG alike on all ranks, "
                        "or give each stage of a pipeline a process_group of its own "
                        "(False where that is one rank)"
                    )
        if any(total != first_total for _, total in theirs):
            raise RuntimeError(
                "gradients differ between ranks, so they have not been averaged: wrap "
                "the model in DistributedDataParallel, or pass process_group=False to "
                "FROG to train on each rank alone"
            )
        self._verified = problem is None

    def agree(
        self,
        layers: Sequence[Layer],
        capture: SampleCapture,
        known: Known,
        found_inf: Tensor | None,
    ) -> tuple[Known, Tensor]:
        """See `SampleExchange.agree`; the host waits for what is not finite."""
        self._row_bytes, self._gathers = {}, 0
        known = known._replace(bad=found_inf is not None and bool(found_inf))
        known = self._exchange.agree(layers, capture, known)
        return known, torch.tensor(float(known.bad))

    def send_samples(self, layers: Sequence[Layer]) -> None:
        """See `SampleExchange.send`."""
        self._exchange.send(layers)

    def samples(
        self, layer: Layer, bias: bool, dtype: torch.dtype, capture: SampleCapture
    ) -> Samples:
        """See `SampleExchange.samples`."""
        found = self._exchange.samples(layer, bias, dtype)
        return found or no_samples(layer, bias, dtype, self.rows_here(layer))

    def own(
        self, steps: Sequence[LayerStep], numbers: Numbers, nesterov: bool
    ) -> list[LayerStep]:
        """This rank's pieces, after the momentum of all rows that it holds."""
        if self.division.replicas > 1:
            steps = advance_momentum(steps, numbers, nesterov)
        return self.pieces(steps)

    def pieces(self, steps: Iterable[LayerStep]) -> list[LayerStep]:
        """The rows of these steps that this rank solves."""
        return [piece for step in steps for piece in self._pieces(step)]

    def _pieces(self, step: LayerStep) -> list[LayerStep]:
        """A layer's own rows, cut so that each piece is a layer of its own."""
        rows, groups = step.layer.geometry.rows, step.layer.geometry.groups
        mine = self.division.mine(step.layer)
        first = self.division.held(step.layer, self.division.rank).start
        per_group = rows // groups
        pieces = []
        for start, stop in _cut(mine, per_group):
            x = step.x
            if x.groups > 1:
                x = x.narrow_groups(start // per_group, -(-stop // per_group))
            solved = slice(start - mine.start, stop - mine.start)
            here = slice(start - first, stop - first)
            pieces.append(step.narrow(here, solved, x, step.y[:, solved]))
        return pieces

    def share_rows(self, steps: Sequence[LayerStep]) -> None:
        """One collective over the replicas for each `BUCKET_BYTES` of rows."""
        bucket: list[tuple[Layer, Tensor]] = []
        size = 0
        for step in steps:
            for tensor in step.params:
                if tensor is None or tensor.numel() == 0:
                    continue
                if bucket and size + tensor.nbytes > collectives.BUCKET_BYTES:
                    self._share_bucket(bucket)
                    bucket, size = [], 0
                bucket.append((step.layer, tensor.detach()))
                size += tensor.nbytes
        if bucket:
            self._share_bucket(bucket)

    def _share_bucket(self, bucket: Sequence[tuple[Layer, Tensor]]) -> None:
        """One collective over the replicas.

        Args:
            bucket: layers, each with one of its parameters.
        """
        replicas, replica_group = self.division.peers(), self.division.replica_group
        if replica_group is None:
            return

        def part(layer: Layer, tensor: Tensor, rank: int) -> Tensor:
            first = self.division.held(layer, rank).start
            solved = self.division.solved(layer, rank)
            return tensor[solved.start - first : solved.stop - first]

        parts = [[part(layer, t, rank) for layer, t in bucket] for rank in replicas]
        specs = [[(tuple(t.shape), t.dtype) for t in tensors] for tensors in parts]
        me = replica_group.rank()
        received = collectives.all_gather(
            parts[me],
            specs,
            replica_group,
            collectives.collective_device(replica_group, bucket[0][1].device),
        )
        others = [i for i in range(len(replicas)) if i != me]
        collectives.copy_(
            [t for i in others for t in parts[i]],
            [t for i in others for t in received[i]],
        )
        self._gathers += 1
        for (layer, _), sent in zip(bucket, parts[me], strict=True):
            before = self._row_bytes.get(layer.name, 0)
            self._row_bytes[layer.name] = before + sent.nbytes * len(others)

    def whole(
        self,
        steps: Sequence[LayerStep],
        solved: Iterable[Sequence[Solved]],
        numbers: Numbers,
    ) -> Iterator[list[directions.Whole]]:
        """Layer by layer, as each rank sends what it has solved to all ranks."""
        found = directions.collect(solved)
        for shared in directions.share(self.division, steps, found):
            self._gathers += 1
            wholes = []
            for step, direction, sent in shared:
                self._row_bytes[step.layer.name] = sent
                held = self.division.held(step.layer, self.division.rank)
                here = slice(held.start, held.stop)
                wholes.append(directions.Whole(step, direction, here))
            yield wholes

    def describe(self, layer: Layer) -> str:
        """What this rank does for a layer, with the bytes it last sent."""
        solved = self.division.mine(layer)
        rows = (
            f"rows {solved.start}-{solved.stop - 1} here" if solved else "no row here"
        )
        if layer.name not in self._exchange.sample_bytes:
            return rows
        samples = self._exchange.sample_bytes[layer.name]
        updated = self._row_bytes.get(layer.name, 0)
        return f"{rows}, sends {samples} B of samples and {updated} B of rows"

    def summary(self) -> str:
        """One line on the ranks, and on the bytes that this one last sent."""
        division = self.division
        line = (
            f"rank {division.rank} of {division.size}: {division.replicas} replicas of "
            f"{division.shards} shards"
        )
        exchange = self._exchange
        if not exchange.notice_bytes:
            return line
        return (
            f"{line}; its last step sent {exchange.notice_bytes} B of counts "
            f"(1 collective), {sum(exchange.sample_bytes.values())} B of samples (1) "
            f"and {sum(self._row_bytes.values())} B of rows ({self._gathers})"
        )


def _cut(rows: range, per_group: int) -> list[tuple[int, int]]:
    """Cut rows where a group ends that they do not hold whole."""
    first = -(-rows.start // per_group) * per_group
    last = rows.stop // per_group * per_group
    at = {rows.start, min(first, rows.stop), max(last, rows.start), rows.stop}
    cuts = sorted(at)
    return list(itertools.pairwise(cuts))


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, the same on every device and for every layout."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integer[tensor.dtype.itemsize]).sum(dtype=torch.int64)
