"""The torch optimizer: groups, state, step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import ops
from .autotune.tuning import Tuning
from .capture import SampleCapture
from .coverage import tell
from .diagnostics import Diagnostics, memory_usage
from .distributed import check_placements, find_world
from .evaluation import FusedInference
from .fallback import FALLBACKS, check_updated_by
from .gradients import GradientWatch
from .groups import (
    check_groups,
    entries,
    fallback_lr,
    own_tensors,
    part_of,
    user_group,
    user_groups,
)
from .guards import (
    is_capturing,
    no_autocast,
    problem_with_grads,
    refuse_to_make_in_graph,
)
from .layers import ROWS_FIRST
from .loading import Loading
from .ops.launch import capturable as without_host_copies
from .ops.types import local
from .options import Options, check, check_group, check_model, scalar
from .routing import OUTPUT_LAYER, Exclusion, Layer, Plan, Route, RoutingTable, route
from .sampling import Counter
from .scaling import Left, leaving, skipping, steps_taken, unscale_
from .seeking import Outputs
from .state import (
    ROW_KEYS,
    STATE_VERSION,
    STEP_KEYS,
    move_state,
    row_state,
    step_counter,
)
from .step import LayerStep, is_mixture, layer_step, untouched
from .unhooked import REASON, Known, Unhooked
from .update import step_layers, tuned
from .warning import warn

if TYPE_CHECKING:
    from .distributed.division import Group


Due = Sequence[tuple[dict[str, Any], Sequence[nn.Parameter]]]
"""Groups, each with the parameters that it updates in a step."""


class FROG(Optimizer):
    """Fisher row-wise preconditioning for the layers of a model.

    For each output row j of a linear map (Linear and convolution layers, attention,
    stacked experts, recurrent layers: see `frog_triton.layers`):
    ``M <- momentum M + G``, then `cg_iters` conjugate-gradient iterations on
    ``(X^T Lambda_j X + damping I) z_j = m_j`` from a small sample of activations X and
    output gradients, where m_j is a row of ``G + momentum M`` (Nesterov). The
    directions ``z_j / sqrt(<z_j, m_j>)`` of a layer make a matrix Z, whose singular
    values are brought near one, and
    ``theta <- (1 - weight_decay lr) theta - lr Z``. A layer's bias is the last entry of
    its rows. All other parameters (norms, embeddings, output layers) are updated by
    `fallback`. How much is preconditioned is told once, by the logger ``frog_triton``
    if logging is configured, else on standard error; below half of all parameters a
    warning says so.

    There are two parameter groups: ``param_groups[0]`` holds what is preconditioned,
    ``param_groups[1]`` the rest, each with its own lr and weight decay, so that any
    learning-rate scheduler works. `params` may bring groups of its own; each is then
    split in two, in that order. Where neither the model nor `output_layers` tells
    which layers are its outputs, the last one is in the second half at first; once the
    first step has shown them, each layer stays in its group, and is updated with the
    options of the half that it belongs to.

    Samples are taken in forward passes in training mode with gradients enabled, of
    layers whose weight or bias takes a gradient. They share the fate of that gradient:
    those of several passes that add to it are pooled, those of a pass that does not
    write it (`torch.autograd.grad` for a penalty, ``backward(inputs=...)``) do not
    count, and where it is dropped, set to None or to zero by whatever hand, they are
    dropped. (Zeros written through ``grad.data`` are not seen on a GPU, or with
    `capturable`.)

    Nothing is decided for good. State is made at the first gradient, and made again
    where it was lost. A layer that has had gradients in three steps in a row without
    being called (its weight is used otherwise, or it is fed nested or sparse tensors)
    is updated by `fallback`, with a warning, until it is called again.

    On several ranks (DistributedDataParallel, or ``fully_shard``) all ranks solve the
    same systems: each draws its share of `sample_size` from its own part of the batch,
    a row is solved by one of the ranks that hold it, from the samples of all, and
    weights are equal, bit for bit, on all ranks that hold them (with `orthogonalize`:
    on ranks with equal hardware and threads). All ranks must build
    FROG alike and call `step` together; both are checked at the first step. The loss
    must have the same scale on all ranks: a common factor cancels, but a rank whose
    loss is scaled up weighs more in the Fisher. So it is with the mean over a smaller
    batch, whose examples weigh more in the averaged gradient, too.

    A step in which any gradient is not finite changes nothing, on all ranks alike; see
    `anomalies`. Gradients that grow a thousandfold within a few steps earn a warning,
    once (not with `capturable`, which reads nothing from the device).

    The defaults train convolutional nets and transformers, with norm layers and
    without, past interpolation and at a constant rate; a rate three times too large
    costs accuracy, not the run (``frog-triton bench stability``). What is left to
    choose:

    - `lr` is about the distance that a row of weights moves in a step, at any width,
      for every kind of layer, with `orthogonalize` and without. Take 0.02 at a constant
      rate. Under a one-cycle schedule (up over a tenth of the steps, then down to zero)
      0.06 was best in most of our trials, at three widths of a net alike, 0.02 to 0.2
      in all of them. Any scheduler that scales all groups alike does. Coming from Muon,
      keep its rate. Coming from AdamW at rate a, try ``0.2 a sqrt(max(R, D))``, which
      is 6 a for layers of a thousand.
    - `fallback_lr` is AdamW's rate for all the rest. 3e-3 suits a ResNet and a BERT.
    - ``orthogonalize=False`` is the step without Muon's products: cheaper on a GPU,
      behind in most of our trials, and it wants the same rates.
    - ``**PAPER`` is the method as it was published: see `frog_triton.PAPER`.

    Args:
        model: whose layers are preconditioned. Hooks are put on them.
        lr: eta, about the distance that a row moves in a step (see above). For a
            matrix of R rows of length D it is the spectral norm of a step, times
            ``sqrt(max(1, R / D))``, torch.optim.Muon's own factor. Without
            `orthogonalize` it is the step's length in the Fisher norm; a row then moves
            ``lr / sqrt(damping)`` at most.
        momentum: beta, applied before preconditioning.
        nesterov: precondition ``G + beta M`` instead of ``M``.
        orthogonalize: bring the singular values of a layer's direction near one, by
            Muon's Newton-Schulz iterations, and step along that. Costs
            ``20 n^2 m + 10 n^3`` operations for an n x m layer (n <= m), as Muon does;
            on several ranks each receives all directions and orthogonalizes them.
        weight_decay: rho, decoupled, times the group's own lr. Applies to whole
            preconditioned rows; of the rest, not to biases and norms. The default is
            torch.optim.AdamW's.
        damping: tau, added to the normalised Fisher, whose mean diagonal is 1. 1 weighs
            the samples and the identity alike: about what a few hundred samples
            support, and with `orthogonalize` as good in our trials as rules that find
            it from the samples (``benchmarks/results/cpu/studies``). The paper advises
            1e-6 to 1e-2, which lets rows move a hundred times `lr` where there are no
            samples. A group entry, to be changed at any time.
        cg_iters: k; the paper advises 3 to 5.
        sample_size: positions or examples to sample for a layer and step. None: 256
            positions or 32 examples (the paper: 16 to 64 examples).
        sampling: ``"positions"``, drawn over batch and space or sequence; or
            ``"examples"``, the paper's: examples of the batch with all their positions.
            In nets for CIFAR-10 the defaults of both train alike over five seeds, and
            positions cost a fifth to a quarter (``benchmarks/results/cpu/studies``).
        params: what to optimize: tensors, or torch-style groups whose entries override
            the defaults; a group's own lr scales its `fallback_lr` as much, unless it
            names one. None: all parameters.
        exclude: module or parameter names, shell patterns of them, or module types
            that go to the fallback.
        exclude_output_layer: send output layers to the fallback, as the paper advises.
            A model's only layer is preconditioned.
        output_layers: which those are, as for `exclude`. None: what the model's
            ``get_output_embeddings()`` and names such as ``lm_head`` tell, else those
            after which the first step meets no other layer on the way to the loss.
        fallback: ``"adamw"``, or ``"sgd"`` (with `momentum` and `nesterov`).
        fallback_lr: its learning rate. None: 3e-3 for AdamW, `lr` for SGD.
        momentum_dtype: of the momentum of preconditioned rows. None: float32, or the
            parameters' own if that is wider.
        seed: of the sampling, which never touches the global random state.
        capturable: never wait for the device, neither in `step` nor in the hooks, so
            that a whole training step can be captured in a CUDA graph; a GradScaler
            then skips steps without waiting, too. Learning rates that change between
            replays must be tensors on the device.
        formulation: ``"primal"``, ``"gram"``, or ``"auto"``, whichever counts cheaper.
        backend: ``"torch"``, ``"triton"`` or ``"auto"``.
        process_group: the ranks that train the model together. None: the mesh of
            sharded parameters, else the default group, if there is one. False: this
            rank trains alone.
        autotune: block sizes of the kernels: ``"cached"`` takes those that
            ``frog-triton autotune`` has found on this GPU, else those shipped for it,
            else defaults; ``"now"`` finds what is missing at the first step, in up to
            four minutes; ``"off"`` takes the defaults.
        autotune_dir: folder of what was found. None: the user's cache folder.

    Raises:
        ValueError: an option out of range, an exclusion that matches nothing, a float64
            model with the Triton backend, a parameter that is not the model's, a
            sharding that leaves no rows whole.
        TypeError: `model` is not a module.

    Example:
        >>> opt = FROG(model, lr=2e-2)
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 2e-2,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        orthogonalize: bool = True,
        weight_decay: float = 1e-2,
        damping: float = 1.0,
        cg_iters: int = 4,
        sample_size: int | None = None,
        sampling: str = "positions",
        params: Iterable[Any] | None = None,
        exclude: Sequence[Exclusion] = (),
        exclude_output_layer: bool = True,
        output_layers: Sequence[Exclusion] | None = None,
        fallback: str = "adamw",
        fallback_lr: float | Tensor | None = None,
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
        formulation: str = "auto",
        backend: str = "auto",
        process_group: Group = None,
        capturable: bool = False,
        autotune: str = "cached",
        autotune_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_model(model)
        check(damping=damping, cg_iters=cg_iters)
        options = Options(
            sampling,
            sample_size,
            fallback,
            fallback_lr,
            momentum_dtype,
            formulation,
            backend,
            exclude,
            exclude_output_layer,
            output_layers,
            process_group,
            capturable,
        )
        self._fallback_lr = scalar(options.own_fallback_lr(lr))
        defaults = {
            "lr": scalar(lr),
            "momentum": scalar(momentum),
            "nesterov": nesterov,
            "orthogonalize": orthogonalize,
            "weight_decay": scalar(weight_decay),
            "damping": scalar(damping),
            "cg_iters": cg_iters,
            "capturable": capturable,
        }
        self._tuning = Tuning(autotune, autotune_dir)
        self.capturable = capturable
        self._step_supports_amp_scaling = capturable  # asked for by GradScaler
        self.formulation = formulation
        self.backend = backend
        self._model = model
        self._options = options
        self._plan = Plan()
        self._layer_of: dict[nn.Parameter, Layer] = {}
        self._anomalies: dict[str, Tensor] = {}
        self._gradients = GradientWatch()
        self._solved: dict[str, str] = {}
        self._unhooked = Unhooked(fallback)
        self._stepped = False
        self._observe: Callable[..., None] | None = None
        groups = self._split(user_groups(model, params), defaults)
        self._world = find_world(self._plan, process_group, capturable)
        self._tuning.group = self._world.group
        size, seed = self._world.share(options.size, seed)
        self.capture = SampleCapture(
            size, sampling, seed, backend, may_wait=not capturable
        )
        super().__init__(groups, defaults)
        own_tensors(self.param_groups)
        self._unhooked.reasons |= self._plan.pending
        self._outputs = Outputs(model, self.capture.stilled)
        self._outputs.seek(self._plan)
        self._told_of: set[str] = set()  # bare parameters
        weakref.finalize(self, self._outputs.stop)
        self._fused = FusedInference(model)
        weakref.finalize(self, self._fused.close)
        self._watch(self._plan.layers.values())
        weakref.finalize(self, self.capture.close)
        self._tell()

    # -- construction ---------------------------------------------------------------

    def _split(
        self, groups: list[dict[str, Any]], defaults: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Check the user's groups, route their parameters and split each in two."""
        names = {p: name for name, p in self._model.named_parameters()}
        group_of: dict[nn.Parameter, int] = {}
        halves: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for i, given in enumerate(groups):
            group = {k: v for k, v in given.items() if k != "fallback_lr"}
            check_group({**defaults, **group})
            beside = {**FALLBACKS[self._options.fallback].defaults, **group}
            beside["lr"] = fallback_lr(given, defaults["lr"], self._fallback_lr)
            beside["updated_by"] = self._options.fallback
            try:
                check_group({**defaults, **beside})
            except ValueError as error:
                raise ValueError(f"fallback_lr: {error}") from None
            halves.append((group | {"updated_by": "frog"}, beside))
            for param in group["params"]:
                if param not in names:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} in params does not "
                        "belong to the model that FROG was given"
                    )
                optimized = self._plan.reasons.get(param, "not in params")
                if param in group_of or optimized != "not in params":
                    raise ValueError(f"{names[param]} appears in more than one group")
                group_of[param] = i
        plan = route(
            self._model,
            group_of,
            self._options.exclude,
            self._options.exclude_output_layer,
            self._options.output_layers,
        )
        for layer in plan.layers.values():
            try:
                dtype = self._options.momentum_dtype or layer.weight.dtype
                ops.resolve(self.backend, layer.weight.device, dtype)
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from None
        layers = [*self._plan.layers.values(), *plan.layers.values()]
        try:
            check_placements(layers, names, self._options.process_group)
        except ValueError:
            if plan.guess is None:
                raise
            plan.keep_guess()  # whatever the first step shows
            layers = [*self._plan.layers.values(), *plan.layers.values()]
            check_placements(layers, names, self._options.process_group)
        self._adopt(plan, group_of)
        preconditioned = plan.preconditioned()
        split = []
        for rows, rest in halves:
            split.append(part_of(rows, preconditioned))
            split.append(part_of(rest, set(rest["params"]) - preconditioned))
        return split

    def _adopt(self, plan: Plan, group_of: dict[nn.Parameter, int]) -> None:
        """Take over a plan; parameters routed before keep their routes."""
        old = self._plan
        kept = {p: reason for p, reason in old.reasons.items() if p not in group_of}
        gone = [p for p in kept if p not in plan.names]
        reasons = plan.reasons | kept | dict.fromkeys(gone, "no longer in the model")
        names = {p: old.names[p] for p in gone} | plan.names
        layers = {**old.layers, **plan.layers}
        before = old if old.names else plan
        self._plan = Plan(layers, names, reasons, before.guess, search=before.search)
        self._plan.named = before.named
        self._plan.pending = {**old.pending, **plan.pending}
        self._layer_of |= {p: lay for lay in plan.layers.values() for p in lay.params}

    def _watch(self, layers: Iterable[Layer]) -> None:
        """Start to capture samples. State is made at the first gradient."""
        params = [p for group in self.param_groups for p in group["params"]]
        self._gradients.expect({self._plan.names[p]: p for p in params})
        this = weakref.ref(self)
        for layer in layers:
            self.capture.watch(layer, _step_reader(this, layer))

    def _tell(self) -> None:
        """Say once how much is preconditioned; warn below half."""
        if not self._world.leads:
            return
        coverage = self.routes().coverage
        told = str(coverage)
        if self._plan.guess is not None:
            told += "; which is the output layer the first step will show"
        if not self._plan.layers:
            text = "FROG preconditions no parameter of this model"
            warn(f"{text}; describe() says why")
        elif coverage.low and not self._plan.bare:
            warn(f"{told}; describe() says why")
        else:
            tell(told)

    def _make_state(self, param: nn.Parameter, group: dict[str, Any]) -> None:
        """Make what is missing of a parameter's state: all of it at first."""
        if group["updated_by"] == "frog":
            layer, dtype = self._layer_of[param], self._options.momentum_dtype
            weight = layer.weight
            axes = layer.axes if param is weight else ROWS_FIRST
            make = partial(row_state, dtype=dtype, axes=axes)
            self._complete(param, ROW_KEYS, make)
            place = weight.device if self.capturable else torch.device("cpu")
            # The layer's counter, whether the weight has a gradient or not.
            self._complete(weight, STEP_KEYS, lambda _: {"step": step_counter(place)})
        else:
            fallback = FALLBACKS[group["updated_by"]]
            self._complete(param, fallback.keys, fallback.init_state)

    def _complete(
        self,
        param: nn.Parameter,
        keys: frozenset[str],
        make: Callable[[nn.Parameter], dict[str, Tensor]],
    ) -> None:
        state = self.state[param]
        missing = keys - state.keys()
        if not missing:
            return
        refuse_to_make_in_graph(self._plan.names[param])
        fresh = make(param)
        state |= {key: fresh[key] for key in sorted(missing)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, for instance of a layer put in later.

        Args:
            param_group: a torch-style group; it is split in two like the first.
        """
        if "updated_by" in param_group:  # one of ours, already split
            super().add_param_group(param_group)
            return
        known, group = self._plan.layers, user_group(param_group)
        if ("param_names" in group) != ("param_names" in self.param_groups[0]):
            raise ValueError(
                "parameter groups must all have names or none: pass (name, tensor) "
                "pairs to all or to none"
            )
        for half in self._split([group], self.defaults):
            super().add_param_group(half)
        own_tensors(self.param_groups)
        self._world.changed()
        new = {n: x for n, x in self._plan.layers.items() if known.get(n) is not x}
        for name in new.keys() & known.keys():  # a module put in another's place
            if self.capture.watches(name):
                self.capture.unwatch(name)
            self._anomalies.pop(name, None)
            self._unhooked.forget(name)
        self._unhooked.reasons |= {
            n: r for n, r in self._plan.pending.items() if n in new
        }
        self._watch(new.values())
        if new:
            self._outputs.decided -= new.keys()
            self._outputs.seek(self._plan)

    # -- the step -------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step of Algorithm 1.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: a gradient is sparse, there has been no backward pass yet, or
                `close` has been called, or a CUDA graph is being captured without
                `capturable`.
            ValueError: an entry of a group is out of range.

        Nothing has been changed where an error is raised.

        A step in which a gradient is not finite changes nothing but, on a GPU, the
        counters of calls that the host keeps; `anomalies` counts it.
        """
        if self.capture.closed:
            raise RuntimeError(
                "this FROG is closed: its hooks are gone; build a new one"
            )
        if not self.capturable and is_capturing():
            raise RuntimeError("to capture step() in a CUDA graph: capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_updated_by(self.param_groups)
        check_groups(self.param_groups)
        names, stepped = self._plan.names, self._stepped
        problem = problem_with_grads(self.param_groups, names, stepped)
        self._world.verify(self._settings, self.param_groups, problem)
        if problem is not None:
            raise RuntimeError(problem)
        found_inf, scaled = self._found_inf()
        layers = list(self._plan.layers.values())
        known = self._unhooked.look(layers, self.capture, not self.capturable)
        decided, outputs = self._outputs.look(known.sampled)
        known = known._replace(decided=decided, outputs=outputs)
        known, found_inf = self._world.agree(layers, self.capture, known, found_inf)
        if found_inf is not None and not scaled:
            self._gradients.count_skipped(found_inf)
        if found_inf is not None and self._may_read(found_inf):
            if found_inf:
                self._outputs.forget()
                self.capture.next_step()
                self._stepped = True
                return loss
            found_inf = None
        self._step(known, found_inf)
        self._learn(known)
        self.capture.next_step()
        self._stepped = True
        return loss

    def _may_read(self, number: Tensor) -> bool:
        """Whether the host may read a number: on a CPU, and if it is no fake."""
        return number.is_cpu and not self.capturable and type(number) is Tensor

    def _step(self, known: Known, found_inf: Tensor | None) -> None:
        """Step; where `found_inf` is not 0, change nothing."""
        # Products in a lower precision are for the model, not for its optimizer.
        with no_autocast(self.param_groups), self._no_waiting():
            # All is gathered before anything is changed.
            undo = self._review(known)
            try:
                due = self._unhooked.due(self.param_groups, self._layer_of)
                for group, params in due:
                    for param in params:
                        self._make_state(param, group)
                    move_state(self.state, group, params)
                self._world.send_samples(self._layers_due(due))
                gathered = [(entry[0], self._gather([entry])) for entry in due]
            except BaseException:
                undo()
                raise
            layers, pieces = self._plan.layers.values(), self._world.pieces
            with tuned(self._tuning, layers, self.backend, pieces, gathered):
                for (group, params), (_, steps) in zip(due, gathered, strict=True):
                    if group["updated_by"] == "frog":
                        self._step_rows(steps, group, found_inf)
                    else:
                        states = [self.state[p] for p in params]
                        fallback = FALLBACKS[group["updated_by"]]
                        fallback.step(params, states, group, found_inf)

    def _found_inf(self) -> tuple[Tensor | None, bool]:
        """Not 0 where a gradient is not finite, so that the step is to be skipped.

        A GradScaler that leaves its work to us has looked already: the second value.
        """
        named = {
            self._plan.names[p]: local(p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        found_inf = getattr(self, "found_inf", None)
        if isinstance(found_inf, Tensor):
            unscale_(named.values(), getattr(self, "grad_scale", None))
            return found_inf, True
        largest = self._gradients.look(named)
        if largest is None:
            return None, False
        if not self.capturable:
            self._gradients.warn_of_growth(largest)
        return (~torch.isfinite(largest)).float(), False

    def _step_rows(
        self,
        steps: list[LayerStep],
        group: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        grads = [step.grads for step in steps if step.grads is not None]
        counts = [self._anomalies[step.layer.name] for step in steps]
        alone = [self._left_alone(step) for step in steps if is_mixture(step.layer)]
        with skipping(grads, counts, found_inf), leaving(alone):
            how = (self.formulation, self._anomalies, self._observe)
            self._solved |= step_layers(self._world, steps, group, *how)
        for step in steps:
            step.write_back()
            counter = self.state[step.layer.weight]["step"]
            # The host's counts calls: it does not wait to hear of a skipped step.
            skipped = found_inf if self.capturable else None
            counter += steps_taken(skipped, counter.device)

    def _left_alone(self, step: LayerStep) -> Left:
        """Of a mixture's layer: the rows of experts that met no token."""
        counts, rows = self._anomalies[step.layer.name], untouched(step)
        return Left(step.grads, rows, counts, self._world.counted(step.layer))

    def _no_waiting(self) -> AbstractContextManager[Any]:
        return without_host_copies() if self.capturable else nullcontext()

    def _gather(self, due: Due) -> list[LayerStep]:
        """What layers bring to the step."""
        layers = self._layers_due(due)
        for layer in layers:
            self._counts_of(layer)
        return [
            layer_step(layer, self.state, self._world, self.capture, self.backend)
            for layer in layers
        ]

    def _layers_due(self, due: Due) -> list[Layer]:
        """Layers among parameters that FROG updates."""
        layers = {
            self._layer_of[p].name: self._layer_of[p]
            for group, params in due
            if group["updated_by"] == "frog"
            for p in params
        }
        return list(layers.values())

    def _settings(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        layers = self._plan.layers.values()
        return {
            "layers": {layer.name: tuple(layer.weight.shape) for layer in layers},
            "sample_size": self._options.size,
            "sampling": self.capture.sampling,
            "formulation": self.formulation,
            "momentum_dtype": self._options.momentum_dtype,
            **entries(self.param_groups),
        }

    def _review(self, known: Known) -> Callable[[], None]:
        """Give layers without samples to the fallback, and take back who has some.

        Returns:
            What undoes it.
        """
        forget = self._unhooked.remember()
        layers = [
            layer
            for layer in self._plan.layers.values()
            if any(p.grad is not None for p in layer.params)
        ]
        decided = [x for x in self._plan.layers.values() if x.name in known.decided]
        changed = self._unhooked.decide(decided, known.outputs)
        changed += self._unhooked.review(layers, known, self.capture)
        params = [p for layer in changed for p in layer.params if p in self.state]
        before: dict[Any, Any] = {param: dict(self.state[param]) for param in params}
        for param in params:  # the other optimizer's is made in its place
            for key in ROW_KEYS.union(STEP_KEYS, *(f.keys for f in FALLBACKS.values())):
                self.state[param].pop(key, None)

        def undo() -> None:
            forget()
            self.state.update(before)

        return undo

    def _learn(self, known: Known) -> None:
        """Keep what a step has shown of output layers; tell what was not expected."""
        text = self._outputs.learn(known.decided, known.outputs, known.sampled)
        bare = known.sampled & self._plan.bare - self._told_of
        self._told_of |= bare
        served = known.decided or bare  # is not what it was
        now = str(self.routes().coverage) if (text or bare) and served else ""
        if (text or now) and self._world.leads:
            tell(". ".join(filter(None, [text, now])))
        if known.decided:
            self._watch_what_is_served()

    def _watch_what_is_served(self) -> None:
        """Output layers that are known as such need no samples."""
        outputs = self._outputs.decided.intersection(self._unhooked.outputs)
        for layer in self._plan.layers.values():
            watched = self.capture.watches(layer.name)
            if layer.name in outputs and watched:
                self.capture.unwatch(layer.name)
            elif layer.name not in outputs and not watched:
                self._watch([layer])

    # -- state ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of all parameters that have had a gradient, and group entries."""

        def add(_: Optimizer, saved: dict[str, Any]) -> None:
            saved["version"] = STATE_VERSION
            saved["let_go"] = dict(self._unhooked.reasons)
            saved["misses"] = dict(self._unhooked.misses)
            saved["decided"] = sorted(self._outputs.decided)

        # Before the user's own hooks.
        hook = self.register_state_dict_post_hook(add, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, with its dtypes.

        Hooks registered for loading see the state before it is checked, and after it
        is in place.

        Args:
            state_dict: of a FROG with the same model and groups.

        Raises:
            ValueError: written by a later version, or groups or shapes that do not
                match. Nothing has been changed then.
        """
        loading = Loading(
            self._plan.names, self.param_groups, self.capturable, self._take_over
        )
        loading.run(self, super().load_state_dict, state_dict)

    def _take_over(self, loaded: Mapping[str, Any]) -> None:
        """Know again what was known when a state was saved."""
        let_go = loaded.get("let_go")
        if let_go is None:  # not by `state_dict`, or by that of version 1
            let_go = dict.fromkeys(self._let_go_by_state(), REASON)
        self._unhooked = Unhooked(self._options.fallback)
        decided = set(loaded.get("decided", self._plan.layers))
        self._outputs.decided = decided
        if "decided" not in loaded:  # by a version that had nothing pending
            self._unhooked.reasons |= self._plan.pending
        for name in self._plan.layers:
            if name in let_go:
                self._unhooked.reasons[name] = let_go[name]
            elif misses := loaded.get("misses", {}).get(name):
                self._unhooked.misses[name] = misses
        if not self.capture.closed:
            self._watch_what_is_served()
            if self._plan.layers.keys() - decided:
                self._outputs.seek(self._plan)
            else:
                self._outputs.stop()
        self._stepped = any(
            bool(state["step"] > 0) for state in self.state.values() if "step" in state
        )

    def _let_go_by_state(self) -> Iterator[str]:
        """Names of layers that have the fallback's state."""
        groups = self.param_groups
        for half, rest in zip(groups[::2], groups[1::2], strict=True):
            keys = FALLBACKS[rest["updated_by"]].keys
            for param in half["params"]:
                layer, held = self._layer_of[param], self.state.get(param, {}).keys()
                by_rows = held >= ROW_KEYS | STEP_KEYS
                if param is layer.weight and held >= keys and not by_rows:
                    yield layer.name

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: hooks tie this object to one model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "FROG is tied to its model by hooks and can be neither copied nor pickled; "
            "use state_dict() and build a new FROG on the other model"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Refuse, as `__getstate__` does."""
        self.__getstate__()
        raise AssertionError

    # -- for the user's eyes ---------------------------------------------------------

    def describe(self, file: Any = None) -> RoutingTable:
        """Print, and return, who updates each parameter and why.

        After a step, also the formulation that each layer was solved in, and on
        several ranks the bytes that this one sent.

        Args:
            file: where to print; standard output by default.
        """
        table = self.routes()
        print(table, file=file)
        return table

    def routes(self) -> RoutingTable:
        """What `describe` prints."""
        updated_by: dict[nn.Parameter, str] = {}
        pairs = zip(self.param_groups[::2], self.param_groups[1::2], strict=True)
        for rows, rest in pairs:
            for p in (*rows["params"], *rest["params"]):
                layer = self._layer_of.get(p)
                gone = layer is None or self._unhooked.holds(layer)
                updated_by[p] = (rest if gone else rows)["updated_by"]
        table = RoutingTable(
            Route(name, tuple(p.shape), updated_by.get(p, "-"), self._reason(p))
            for p, name in self._plan.names.items()
        )
        table.note = self._world.summary()
        return table

    def _reason(self, param: nn.Parameter) -> str:
        layer = self._layer_of.get(param)
        here = layer is not None and self._plan.layers.get(layer.name) is layer
        reason = self._plan.reasons[param]
        if layer is not None and layer.name in self._plan.bare:
            reason = "by frog_triton.linear"
        notes = []
        if layer is not None and here:
            if layer.name in self._unhooked.reasons:
                reason = self._unhooked.reasons[layer.name]
                if reason == OUTPUT_LAYER and layer.name not in self._outputs.decided:
                    notes.append("the last; its first step will show")
            else:
                notes.append(self._solved.get(layer.name, ""))
        if layer is not None and not self._unhooked.holds(layer):
            notes.append(self._world.describe(layer))
        if not param.requires_grad:
            notes.append("frozen")
        return "; ".join(filter(None, [reason, *notes]))

    def anomalies(self) -> dict[str, dict[str, int]]:
        """What was not finite so far; reading it waits for the device.

        A step in which any gradient is not finite changes nothing. On several ranks
        each counts what it holds, and all skip together.

        Returns:
            Only what there was: under ``"model"`` the ``skipped_steps``, without those
            that a GradScaler skips; under the name
            of a parameter, in how many steps its gradient held values that are not
            finite, ``nonfinite_gradients``; and under that of a layer
            ``nonfinite_samples``, rows that took the identity Fisher because of
            samples that were not finite, and ``overflowing_momenta``, rows left as
            they were because their momentum would not have been finite.
        """
        found = self._gradients.counts()
        kinds = ("nonfinite_samples", "overflowing_momenta")
        for name, value in self._anomalies.items():
            rows = dict(zip(kinds, value.sum(1).tolist(), strict=True))
            if any(rows.values()):
                found[name] = found.get(name, {}) | rows
        return found

    @contextmanager
    def diagnose(self) -> Iterator[Diagnostics]:
        """Steps in this context are looked at; all others cost nothing more.

        Example:
            >>> with opt.diagnose() as diagnostics:
            ...     opt.step()
            >>> diagnostics.read()["fc"]["cg_residual"]  # waits for the device
        """
        diagnostics = Diagnostics()
        self._observe = diagnostics.observe
        try:
            yield diagnostics
        finally:
            self._observe = None

    def memory_usage(self) -> dict[str, int]:
        """Bytes that this optimizer holds at this moment.

        Returns:
            ``state`` (of all parameters, the fallback's too), ``samples`` (between a
            backward pass and `step`), ``counters`` of anomalies, and ``total``.
        """
        held = (t for values in self.state.values() for t in values.values())
        state = (t for t in held if isinstance(t, Tensor))
        counters = [*self._anomalies.values(), *self._gradients.counters()]
        return memory_usage(state, self.capture.tensors(), counters)

    def _counts_of(self, layer: Layer) -> None:
        """Make, or bring to the layer's device, its counters."""
        device = layer.weight.device
        counts = self._anomalies.get(layer.name)
        if counts is None:
            refuse_to_make_in_graph(layer.name)
            shape = (2, self._world.rows_here(layer))
            counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self._anomalies[layer.name] = counts.to(device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the samples that belong to them."""
        super().zero_grad(set_to_none)
        self.drop_samples()

    def drop_samples(self) -> None:
        """Forget what has been sampled so far, and keep the gradients.

        For a pass that adds to the gradients, but is not to shape the Fisher, such as
        that of a regularizer. Samples whose gradient is gone are dropped without it,
        and derivatives inside a loss (``torch.autograd.grad``) never count.

        Example:
            >>> consistency(model).backward()
            >>> opt.drop_samples()
            >>> loss_fn(model(x), y).backward()
            >>> opt.step()
        """
        self.capture.clear()
        self._outputs.forget()

    def close(self) -> None:
        """Remove the hooks from the model. The optimizer takes no more samples."""
        self._outputs.stop()
        self._fused.close()
        self.capture.close()

    def __enter__(self) -> Self:
        """Nothing to do; `close` is called at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self.close()


def _step_reader(this: weakref.ref[FROG], layer: Layer) -> Callable[[], Counter]:
    def step() -> Counter:
        optimizer = this()
        if optimizer is None:
            return 0
        counter = optimizer.state.get(layer.weight, {}).get("step")
        if counter is None or layer.name in optimizer._unhooked.reasons:
            return 0
        return counter.to(torch.int64) if optimizer.capturable else int(counter)

    return step
