"""Which layers of a model are its output layers.

`named_outputs` goes by what a model calls its parts; `OutputSearch` by what happens in
a training pass: an output layer is one after which no other comes on the way to the
loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

# -- by name ---------------------------------------------------------------------------

DECLARING = ("get_output_embeddings", "get_classifier")
"""Methods by which models of transformers and timm tell their output layer."""

HEADS = frozenset(
    # classification, and language models
    ("head", "heads", "classifier", "classification_head", "score", "cls")
    + ("sop_classifier", "qa_outputs", "multiple_choice_head")
    + ("lm_head", "lm_heads", "ctc_head", "output_projection")
    # the teacher's, of distilled models
    + ("head_dist", "dist_head", "classifier_distill")
    + ("cls_classifier", "distillation_classifier")
    # segmentation, detection
    + ("decode_head", "segmentation_head", "regression_head")
    + ("class_labels_classifier", "bbox_predictor", "class_embed", "bbox_embed")
    # actor and critic
    + ("actor", "critic", "policy_head", "value_head")
)
"""What only an output is called, as a child of the model itself."""

TOWERS = frozenset(
    ("text_projection", "visual_projection", "vision_projection")
    + ("image_projection", "audio_projection")
)
"""Outputs of several towers; a single one is where one modality enters another."""

LAST = frozenset(("fc", "out", "output"))
"""What an output is called if no layer is declared after it."""

AUXILIARY = frozenset(("aux_classifier", "auxiliary_head", "aux1", "aux2", "AuxLogits"))
"""Outputs beside another one."""


def named_outputs(
    model: nn.Module, candidates: Iterable[tuple[str, nn.Module]]
) -> set[nn.Module] | None:
    """The output layers, as far as the model's own methods and names tell.

    What `DECLARING` methods return, children with a name of `HEADS` and two or more
    with a name of `TOWERS` are outputs, each of them where there are several. Without
    any, the last child with parameters is one if its name is in `LAST`.

    Of a head of several layers it is its own heads, by the same names, or else the last
    candidate in it; of a list or dict of heads, one of each. A module whose only child
    has all parameters (a wrapper, such as DistributedDataParallel) is looked through.

    Args:
        model: the model.
        candidates: name and module of each layer that can be preconditioned.

    Returns:
        Candidates; in place of a head that has weights and no candidate, the head
        itself: then the output is none of the candidates. None if nothing is told.
    """
    known = {module for _, module in candidates}
    heads = _heads(model)
    return {output for head in heads for output in _outputs(head, known)} or None


def _heads(model: nn.Module) -> list[nn.Module]:
    """The heads of a model, which may be of several layers."""
    children = {
        name: child
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None
    }
    if len(children) == 1 and not model._parameters:
        found = _heads(*children.values())
        if found:
            return found
    towers = _called(children, TOWERS)
    found = _declared(model) + _called(children, HEADS)
    found += towers if len(towers) > 1 else []
    if not found and children:
        found = _called(dict(list(children.items())[-1:]), LAST)
    return found + _called(children, AUXILIARY) if found else []


def _called(
    children: Mapping[str, nn.Module], names: Collection[str]
) -> list[nn.Module]:
    return [child for name, child in children.items() if name in names]


def _declared(model: nn.Module) -> list[nn.Module]:
    """What the model's own methods return, if that has weights."""
    found: list[Any] = []
    for name in DECLARING:
        try:
            told = getattr(model, name)()
        except Exception:  # missing, not implemented, or another library's
            continue
        found += told if isinstance(told, (list, tuple)) else [told]
    return [
        head
        for head in found
        if isinstance(head, nn.Module) and any(p.ndim > 1 for p in head.parameters())
    ]


def _outputs(head: nn.Module, known: set[nn.Module]) -> set[nn.Module]:
    """The last layer or layers of a head."""
    if head in known:
        return {head}
    weight = head._parameters.get("weight")
    if weight is not None:  # an embedding, of a layer that shares its weight
        tied = {m for m in known if m._parameters.get("weight") is weight}
        if tied:
            return tied
    parts = _called(dict(head.named_children()), HEADS)
    if isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        parts = list(head.children())
    found = {output for part in parts for output in _outputs(part, known)}
    if found:
        return found
    inside = [module for module in head.modules() if module in known]
    if inside:
        return {inside[-1]}
    return {head} if any(p.ndim > 1 for p in head.parameters()) else set()


# -- by what happens -------------------------------------------------------------------


class OutputSearch:
    """Finds the units whose outputs go to the loss through no other unit.

    `saw` is told of calls in the forward pass; the backward pass tells which of them
    got a gradient (arrived); `found` then walks the graph back from the inputs of all
    of these. A unit is an output if one of its arrived calls is not met: with layers
    called in a loop, that is the layer whose last call comes last.

    What is known of a call lives in its graph until its gradient arrives, so that a
    graph without a backward pass dies as usual. From then until `clear` nodes of the
    graph are kept, as by a loss that is kept: the tensors they saved are freed by the
    backward pass.

    Calls inside a segment under reentrant checkpointing have no graph, and are not
    seen; their neighbours outside are, with the segment as the way from one to the
    other. A segment that ends at the loss hides the outputs in it.

    Attributes:
        visited: graph nodes that the last `found` walked over.
    """

    def __init__(self) -> None:
        self.visited = 0
        self._made: dict[Node, set[_Call]] = {}
        self._arrived: set[_Call] = set()
        self._earlier: set[_Call] = set()

    def saw(self, unit: Hashable, inputs: Any, outputs: Any) -> None:
        """Note a call, to be told from a forward hook.

        Calls without a graph, while a backward pass runs (checkpoints compute again)
        and under any tracing or transform are left out.

        Args:
            unit: what was called. Units without trainable weights count as well:
                nothing that feeds one is an output.
            inputs: its arguments: tensors in any nesting of sequences, mappings and
                dataclasses.
            outputs: what it returned, likewise.
        """
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return
        if torch._C._are_functorch_transforms_active():
            return
        if torch._C._current_graph_task_id() >= 0:
            return
        made = {node for y in _tensors(outputs) if (node := _maker(y)) is not None}
        fed = {x.grad_fn for x in _tensors(inputs) if x.grad_fn is not None}
        call, search = _Call(unit, fed - made), weakref.ref(self)

        # Neither the search nor the node is held by what the node holds.
        def on_grads(grads: tuple[Tensor | None, ...]) -> None:
            here = search()
            if here is not None and any(grad is not None for grad in grads):
                here._arrive(call)

        for node in made:
            node.register_prehook(on_grads)

    def _arrive(self, call: _Call) -> None:
        if torch.compiler.is_compiling():  # by compiled autograd
            return
        node = torch._C._current_autograd_node()
        if node is not None:
            self._made.setdefault(node, set()).add(call)
            self._arrived.add(call)

    @property
    def arrived(self) -> set[Hashable]:
        """Units whose outputs got a gradient."""
        return {call.unit for call in self._arrived}

    def found(self) -> set[Hashable] | None:
        """Units that are outputs, after the backward pass; None if none arrived.

        Takes time linear in the size of the graph: all walks together come to each
        node once.
        """
        if not self._arrived:
            return None
        calls = self._arrived | self._earlier
        waiting = [node for call in calls for node in call.fed]
        visited: set[Node] = set()
        consumed: set[_Call] = set()
        while waiting:
            node = waiting.pop()
            if node in visited:
                continue
            visited.add(node)
            consumed |= self._made.get(node, set())
            waiting += [n for n, _ in node.next_functions if n is not None]
        self.visited = len(visited)
        return {call.unit for call in self._arrived - consumed}

    def forget(self) -> None:
        """Gradients so far are dropped: their calls are no outputs by themselves.

        What they consume stays known once more: a graph that was derived before, for
        a gradient penalty, may be part of the loss.
        """
        self._earlier = self._arrived or self._earlier
        self._made, self._arrived = {}, set()

    def clear(self) -> None:
        """Drop all that is known, and the graphs with it."""
        self._made, self._arrived, self._earlier = {}, set(), set()


class _Call:
    """One call of a unit, and the nodes that made its inputs."""

    __slots__ = ("fed", "unit")

    def __init__(self, unit: Hashable, fed: set[Node]) -> None:
        self.unit = unit
        self.fed = fed


def _maker(y: Tensor) -> Node | None:
    """The node that made a tensor, or what the tensor is another shape of.

    A Linear layer's output for a sequence is a view. An in-place activation on it takes
    the view's own node out of the graph; that of the viewed tensor stays.
    """
    base = y._base
    if base is None or base.grad_fn is None or base.numel() != y.numel():
        return y.grad_fn
    return base.grad_fn


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in a nesting of sequences, mappings and dataclasses."""
    parts: Iterable[Any] = ()
    match tree:
        case Tensor():
            yield tree
        case Mapping():
            parts = tree.values()
        case list() | tuple():
            parts = tree
        case _ if is_dataclass(tree):
            parts = [getattr(tree, field.name, None) for field in fields(tree)]
    for part in parts:
        yield from _tensors(part)
