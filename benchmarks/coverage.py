"""How much of real models FROG preconditions, after a few steps on one batch.

    frog-triton bench coverage
    frog-triton bench coverage --models 'bert*' timm --steps 50

Every model is small, of a real architecture and with random weights; FROG has its
defaults. Models are chosen by name or package, shell patterns included. A model that
fails is a row with its error; one whose loss did not fall is marked.

More than 400 lines: one program from the models to the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import math
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from .. import FROG
from ..cli import output
from ..cli.arguments import output_file, positive
from ..cli.errors import CommandError
from .records import Results, write_text
from .train.report import markdown
from .zoo import MODELS, Model

PACKAGES = ("torch", "transformers", "timm", "torchvision", "diffusers", "peft")

COLUMNS = (
    "model ",
    "package ",
    "parameters",
    "of them FROG's",
    "of tensors",
    "of linear maps",
    "output layers ",
    "largest linear map left out ",
    "loss ",
    "warnings",
)

_TABLES = (nn.Embedding, nn.EmbeddingBag)

_NO_MAPS = ("bias", "embed", "token", "A_log")
"""Parts of the names of parameters that are added, looked up or exponents."""

Entry = Mapping[str, Any]
"""What a model is called and what came of it: `Found` as a dictionary, or an error."""


@dataclass(frozen=True)
class Found:
    """What the steps on one model showed; frozen parameters do not count.

    Attributes:
        parameters: elements that are trained.
        tensors: parameters that are trained.
        share: of the elements, those that FROG updates.
        tensor_share: of the tensors.
        linear_share: of the elements of linear maps; None where there are none.
        output_layers: weights that are left out because they give the output.
        largest: the largest linear map that FROG does not update: its ``name``,
            ``shape`` and ``reason``; None where it updates all.
        left_out: for each reason the ``tensors`` and ``parameters`` that FROG does not
            update, and an ``example``, the largest of them.
        first: loss before the first step.
        last: loss after the last.
        fell: whether it is finite and lower.
        warned: what was warned of, each once.
    """

    parameters: int
    tensors: int
    share: float
    tensor_share: float
    linear_share: float | None
    output_layers: list[str]
    largest: dict[str, Any] | None
    left_out: dict[str, dict[str, Any]]
    first: float
    last: float
    fell: bool
    warned: list[str]


@dataclass(frozen=True)
class _Tensor:
    """One trained parameter, and who updates it why."""

    name: str
    shape: tuple[int, ...]
    preconditioned: bool
    reason: str
    linear: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def examine(model: Model, steps: int) -> Found:
    """Build a model, train it by FROG with its defaults, and look at who did what.

    Args:
        model: from the zoo, or another.
        steps: at least one.
    """
    torch.manual_seed(0)
    with _quiet():
        trained = model.build()
    with warnings.catch_warnings(record=True) as warned, _quiet():
        warnings.simplefilter("default")
        optimizer = FROG(trained.model)
        first = _train(trained.loss, optimizer, steps)
        last = trained.loss().item()
        table = optimizer.describe(file=io.StringIO())
    own = _parameters(trained.model)
    return _count(
        [
            _Tensor(
                name=route.name,
                shape=route.shape,
                preconditioned=route.updated_by == "frog",
                reason=route.reason.partition(";")[0],
                linear=is_linear_map(*own[route.name]),
            )
            for route in table
            if own[route.name][-1].requires_grad
        ],
        first=first,
        last=last,
        fell=last < first,
        warned=sorted(
            {shorten(str(w.message), 300, placeholder=" ...") for w in warned}
        ),
    )


def _short(message: Warning | str) -> str:
    return shorten(str(message), 300, placeholder=" ...")


def is_linear_map(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    """Whether a parameter is a weight of two or more dimensions that is multiplied by.

    Embeddings, positions, tokens, biases of experts and factors for each row (of shape
    ``(R, 1)``, say) are none.

    Args:
        module: that holds the parameter.
        name: of the parameter in that module.
        param: the parameter.
    """
    apart = isinstance(module, _TABLES) or any(part in name for part in _NO_MAPS)
    wide = sum(size > 1 for size in param.shape) > 1 or name == "weight"
    return param.ndim > 1 and wide and not apart


def _train(loss: Callable[[], Tensor], optimizer: FROG, steps: int) -> float:
    """Make the steps; the loss of the first."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the optimizer's line about its coverage: the table says more."""
    log, handler = logging.getLogger("frog_triton"), logging.NullHandler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """By name: the module that holds it, its name there, the parameter."""
    return {
        f"{path}.{name}" if path else name: (module, name, param)
        for path, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
    }


def _count(tensors: Sequence[_Tensor], **more: Any) -> Found:
    rest = [t for t in tensors if not t.preconditioned]
    output_layers = [t for t in rest if "output layer" in t.reason]
    maps = [t for t in tensors if t.linear and t not in output_layers]
    missed = [t for t in maps if not t.preconditioned]
    largest = max(missed, key=lambda t: t.size, default=None)
    reasons: dict[str, list[_Tensor]] = {}
    for tensor in rest:
        reasons.setdefault(tensor.reason, []).append(tensor)
    return Found(
        parameters=_size(tensors),
        tensors=len(tensors),
        share=1 - _size(rest) / _size(tensors),
        tensor_share=1 - len(rest) / len(tensors),
        linear_share=1 - _size(missed) / _size(maps) if maps else None,
        output_layers=[t.name for t in output_layers if len(t.shape) > 1],
        largest=_told(largest) if largest else None,
        left_out={
            reason: {
                "tensors": len(some),
                "parameters": _size(some),
                "example": max(some, key=lambda t: t.size).name,
            }
            for reason, some in reasons.items()
        },
        **more,
    )


def _told(tensor: _Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": tensor.shape, "reason": tensor.reason}


def _size(tensors: Sequence[_Tensor]) -> int:
    return sum(t.size for t in tensors)


# -- tables -------------------------------------------------------------------------


def row(entry: Entry) -> list[str]:
    """A cell for each of `COLUMNS`."""
    names = [entry["model"], entry["package"]]
    if "error" in entry:
        error = entry["error"]
        said = f"{error['type']}: {error['message']}".splitlines()[0]
        return [*names, *["-"] * 5, f"error: {said[:200]}", "-", "-"]
    largest, linear = entry["largest"], entry["linear_share"]
    fell = "" if entry["fell"] else ", did not fall"
    return [
        *names,
        f"{entry['parameters']:,}",
        f"{entry['share']:.1%}",
        f"{entry['tensor_share']:.1%}",
        "-" if linear is None else f"{linear:.1%}",
        ", ".join(entry["output_layers"]) or "-",
        f"{largest['name']}: {largest['reason']}" if largest else "-",
        f"{entry['first']:.3g} to {entry['last']:.3g}{fell}",
        str(len(entry["warned"]) or "-"),
    ]


def left_out(entries: Sequence[Entry]) -> list[list[str]]:
    """A header, and a row for each reason, that of the most parameters first."""
    found: dict[str, list[tuple[str, Entry]]] = {}
    for entry in entries:
        for reason, counts in entry.get("left_out", {}).items():
            found.setdefault(reason, []).append((entry["model"], counts))
    lines = []
    for reason, several in found.items():
        name, most = max(several, key=lambda one: one[1]["parameters"])
        tensors, size = (
            sum(counts[what] for _, counts in several)
            for what in ("tensors", "parameters")
        )
        example = f"{most['example']} of {name}"
        lines.append((size, [reason, str(len(several)), str(tensors), example]))
    lines.sort(key=lambda line: -line[0])
    header = ["why", "models", "tensors", "parameters", "largest"]
    return [header, *([*r[:3], f"{size:,}", r[3]] for size, r in lines)]


def page(entries: Sequence[Entry], skipped: Sequence[str], command: str) -> str:
    """All of it in Markdown.

    Args:
        entries: of the models that were run.
        skipped: a line for each package that is missing.
        command: that made it.
    """
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    header = [column.strip() for column in COLUMNS]
    warned = [[e["model"], w] for e in entries for w in e.get("warned", ())]
    parts = [
        "# What FROG preconditions of real models",
        f"    {command}\n\nWith {versions}.",
        "Every model is small, of the real architecture, with random weights. FROG has "
        "its defaults and makes its steps on one batch. Shares are of what is trained. "
        "Linear maps are weights of two or more dimensions that are neither embeddings "
        "(or positions, or tokens) nor output layers.",
        _cells([header, *map(row, entries)]),
        "## What is left out, and why",
        _cells(left_out(entries)),
    ]
    if warned:
        parts += ["## Warnings", _cells([["model", "warning"], *warned])]
    return "\n\n".join([*parts, *skipped]) + "\n"


def _cells(table: Sequence[Sequence[str]]) -> str:
    """Markdown in which nothing that a cell holds ends it."""
    return markdown([[cell.replace("|", "\\|") for cell in line] for line in table])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- command ------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        default=["*"],
        help="(default: all) " + "; ".join(model.name for model in MODELS),
    )
    parser.add_argument("--steps", type=positive, default=20, help="(default: 20)")
    output.add_outputs(parser)
    parser.add_argument(
        "--write", type=output_file, metavar="FILE.md", help="write the tables there"
    )


def run(args: argparse.Namespace) -> int:
    """Train all that are asked for; returns 1 if one failed or did not learn."""
    chosen = choose(args.models)
    missing: dict[str, list[str]] = {}
    for model in chosen:
        if not model.installed:
            missing.setdefault(model.package, []).append(model.name)
    skipped = [
        f"Left out for want of {package}: {', '.join(names)} "
        "(pip install 'frog-triton[coverage]')."
        for package, names in missing.items()
    ]
    console = output.console()
    try:
        results = Results(args.json)
        for model in chosen:
            if model.installed:
                console.print(f"{model.name} ...")
                names = {"model": model.name, "package": model.package}
                results.add(names, partial(_examined, model, args.steps))
        entries = results.entries
        output.print_table("Preconditioned by FROG", COLUMNS, map(row, entries))
        header, *lines = left_out(entries)
        output.print_table("Left out", (f"{header[0]} ", *header[1:]), lines)
        for line in skipped:
            console.print(line)
        if args.write is not None:
            words = [f"--steps {args.steps}"] if args.steps != 20 else []
            if args.models != ["*"]:
                words.append(f"--models {shlex.join(args.models)}")
            command = " ".join(["frog-triton bench coverage", *words])
            write_text(args.write, page(entries, skipped, command))
    except OSError as error:
        raise CommandError(f"cannot write: {error}", 1) from error
    return int(not all(entry.get("fell", False) for entry in entries))


def choose(patterns: Sequence[str]) -> list[Model]:
    """Models by name or package, in any case of letters; patterns as the shell has."""
    wanted = [pattern.lower() for pattern in patterns]
    found: dict[str, list[Model]] = {
        pattern: [
            model
            for model in MODELS
            if any(fnmatchcase(n.lower(), pattern) for n in (model.name, model.package))
        ]
        for pattern in wanted
    }
    for pattern, models in found.items():
        if not models:
            names = ", ".join(model.name for model in MODELS)
            raise CommandError(f"no model is called {pattern!r}; there are: {names}")
    return [m for m in MODELS if any(m in models for models in found.values())]


def _examined(model: Model, steps: int) -> dict[str, Any]:
    return asdict(examine(model, steps))
