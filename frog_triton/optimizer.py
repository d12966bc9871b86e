"""The torch optimizer: groups, state, step.

More than 400 lines, half of them what users are told about options and errors.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .anomalies import Anomalies
from .assignment import Assignment
from .autotune.tuning import Tuning
from .capture.capture import SampleCapture
from .capture.evaluation import FusedInference
from .circumstances import Circumstances
from .distributed import find_world
from .fallback import FALLBACKS, check_updated_by
from .gathering import Gathering
from .gradients import GradientWatch, local_grads
from .groups import check_groups, check_names, own_tensors, user_group, user_groups
from .guards import may_read, modes, problem_with_grads, refuse_to_step
from .inspection import Inspection
from .kernels.board import Pages
from .loading import Loading, adding
from .model.plan import Plan
from .model.routing import Exclusion
from .options import Options, check, scalar
from .partition import Partition
from .routines import KnownStep, Routines
from .scaling import unscaled
from .state import STATE_VERSION
from .unhooked import Known
from .update import step_rows, tuned
from .wrapping import check_model, check_params

if TYPE_CHECKING:
    from .distributed.division import Group


class FROG(Inspection):
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
    - `fallback_lr` is AdamW's rate for all the rest.
    - ``orthogonalize=False`` is the step without Muon's products: cheaper on a GPU,
      behind in most of our trials, and it wants the same rates.
    - ``**PAPER`` is the method as it was published: see `frog_triton.PAPER`.

    Args: Essentials
        model: whose layers are preconditioned. Hooks are put on them.
        lr: eta, about the distance that a row moves in a step (see above). For a
            matrix of R rows of length D it is the spectral norm of a step, times
            ``sqrt(max(1, R / D))``, torch.optim.Muon's own factor. Without
            `orthogonalize` it is the step's length in the Fisher norm; a row then moves
            ``lr / sqrt(damping)`` at most. The default is safe at a constant rate
            (``frog-triton bench stability``).
        fallback_lr: learning rate of the fallback. None: 3e-3 for AdamW, which even
            three times the usual `lr` did not upset in our trials, and `lr` for SGD.
        weight_decay: rho, decoupled, times the group's own lr. Applies to whole
            preconditioned rows; of the rest, not to biases and norms. The default is
            torch.optim.AdamW's.
        fallback: of all that is not preconditioned: ``"adamw"``, or ``"sgd"`` (with
            `momentum` and `nesterov`).
        exclude: module or parameter names, shell patterns of them, or module types
            that go to the fallback.
        exclude_output_layer: send output layers to the fallback, as the paper advises.
            A model's only layer is preconditioned.
        output_layers: which those are, as for `exclude`. None: what the model's
            ``get_output_embeddings()`` and names such as ``lm_head`` tell, else those
            after which the first step meets no other layer on the way to the loss.
        params: what to optimize: tensors, or torch-style groups whose entries override
            the defaults; a group's own lr scales its `fallback_lr` as much, unless it
            names one. None: all parameters.
        seed: of the sampling, which never touches the global random state.

    Args: Method
        momentum: beta, in [0, 1), applied before preconditioning. 0.9 did better than
            Muon's 0.95 over the short budgets of our trials.
        nesterov: precondition ``G + beta M`` instead of ``M``. Gained half a point on
            images.
        orthogonalize: bring the singular values of a layer's direction near one, by
            Muon's Newton-Schulz iterations, and step along that. Costs
            ``20 n^2 m + 10 n^3`` operations for an n x m layer (n <= m), as Muon does;
            on several ranks each receives all directions and orthogonalizes them. The
            default because it beat Muon, and the step without it, on every seed.
        damping: tau, added to the normalized Fisher, whose mean diagonal is 1. 1 weighs
            the samples and the identity alike: about what a few hundred samples
            support, and with `orthogonalize` as good in our trials as rules that find
            it from the samples (``benchmarks/results/cpu/studies``). The paper advises
            1e-6 to 1e-2, which lets rows move a hundred times `lr` where there are no
            samples. A group entry, to be changed at any time.
        cg_iters: k; the paper advises 3 to 5, and fewer than 4 lost accuracy in our
            trials.
        sample_size: positions or examples to sample for a layer and step. None: 128
            positions, beyond which nothing was gained in our trials
            (``benchmarks/results/cpu/studies/sample-size``), or 32 examples (the paper:
            16 to 64).
        sampling: ``"positions"``, drawn over batch and space or sequence; or
            ``"examples"``, the paper's: examples of the batch with all their positions.
            In nets for CIFAR-10 the defaults of both train alike over five seeds, and
            positions cost a fifth to a quarter (``benchmarks/results/cpu/studies``).
        sample_steps: T, steps whose positions are solved together: this one's and those
            of the T - 1 before, each step's output gradients divided by their root mean
            square. 4 was better on seven of nine small problems, mostly by a little
            (``benchmarks/results/cpu/studies``), at the price of T times `sample_size`
            in the solve, not in the sampling, and of state for ``T sample_size`` rows
            of X and Y a layer. One rank only.

    Args: Distributed
        process_group: the ranks that train the model together. None: the mesh of
            sharded parameters, else the default group, if there is one. False: this
            rank trains alone.

    Args: Kernels
        backend: ``"torch"``, ``"triton"`` or ``"auto"``: Triton for CUDA tensors.
        formulation: ``"primal"``, ``"gram"``, or ``"auto"``, whichever counts cheaper.
        momentum_dtype: of the momentum of preconditioned rows. None: float32, or the
            parameters' own if that is wider.
        capturable: never wait for the device, neither in `step` nor in the hooks, so
            that a whole training step can be captured in a CUDA graph; a GradScaler
            then skips steps without waiting, too. Learning rates that change between
            replays must be tensors on the device.
        autotune: block sizes of the kernels: ``"cached"`` takes those that
            ``frog-triton autotune`` has found on this GPU, else those shipped for it,
            else defaults; ``"now"`` finds what is missing at the first step, in up to
            four minutes; ``"off"`` takes the defaults.
        autotune_dir: folder of what was found. None: the user's cache folder.

    Raises:
        ValueError: an option out of range, an exclusion that matches nothing, a float64
            model with the Triton backend, a parameter that is not the model's, a
            sharding that leaves no rows whole, a wrapper that flattens weights, tensor
            parallelism.
        TypeError: `model` is not a module.

    Examples:
        >>> opt = FROG(model, lr=2e-2)
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()

    Parameter groups:
        There are two parameter groups: ``param_groups[0]`` holds what is
        preconditioned, ``param_groups[1]`` the rest, each with its own lr and weight
        decay, so that any learning-rate scheduler works. `params` may bring groups of
        its own; each is then split in two, in that order. Where neither the model nor
        `output_layers` tells which layers are its outputs, the last one is in the
        second half at first; once the first step has shown them, each layer stays in
        its group, and is updated with the options of the half that it belongs to.

    Samples:
        Samples are taken in forward passes in training mode with gradients enabled, of
        layers whose weight or bias takes a gradient. They share the fate of that
        gradient: those of several passes that add to it are pooled, those of a pass
        that does not write it (`torch.autograd.grad` for a penalty,
        ``backward(inputs=...)``) do not count, and where it is dropped, set to None or
        to zero by whatever hand, they are dropped. (Zeros written through ``grad.data``
        are not seen on a GPU, or with `capturable`.)

        Nothing is decided for good. State is made at the first gradient, and made again
        where it was lost. A layer that has had gradients in three steps in a row
        without being called (its weight is used otherwise, or it is fed nested or
        sparse tensors) is updated by `fallback`, with a warning, until it is called
        again.

    Several ranks:
        On several ranks (DistributedDataParallel, or ``fully_shard``) all ranks solve
        the same systems: each draws its share of `sample_size` from its own part of the
        batch, a row is solved by one of the ranks that hold it, from the samples of
        all, and weights are equal, bit for bit, on all ranks that hold them (with
        `orthogonalize`: on ranks with equal hardware and threads). All ranks must build
        FROG alike and call `step` together; both are checked at the first step. The
        loss must have the same scale on all ranks: a common factor cancels, but a rank
        whose loss is scaled up weighs more in the Fisher. So it is with the mean over a
        smaller batch, whose examples weigh more in the averaged gradient, too.

    Recorded steps:
        On a single GPU a step is recorded as a CUDA graph when its like comes a second
        time, and played from then on: from step to step only gradients and samples lie
        elsewhere and rates change. Whatever else changes, the step is taken launch by
        launch. `describe` says how steps are taken.

    Numbers that are not finite:
        A step in which any gradient is not finite changes nothing, on all ranks alike;
        see `anomalies`. Gradients that grow a thousandfold within a few steps earn a
        warning, once (not with `capturable`, which reads nothing from the device).
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
        sample_steps: int = 1,
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
        check(damping=damping, cg_iters=cg_iters, seed=seed)
        options = Options(
            sampling,
            sample_size,
            sample_steps,
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
        self._options = options
        self._step_supports_amp_scaling = capturable  # asked for by GradScaler
        self._tuning = Tuning(autotune, autotune_dir)
        self._gradients, self._anomalies = GradientWatch(backend), Anomalies()
        self._solved: dict[str, str] = {}  # how, by layer
        self._stepped = False
        self._pages = Pages()  # of CUDA graphs that capture a step
        self._observe: Callable[..., None] | None = None
        self._partition = Partition(model, options, scalar(options.own_fallback_lr(lr)))
        groups = self._partition.split(user_groups(model, params), defaults)
        self._world = find_world(self._plan, process_group, capturable, sample_steps)
        self._tuning.group = self._world.group
        size, seed = self._world.share(options.size, seed)
        self.capture = SampleCapture(
            size, sampling, seed, backend, may_wait=not capturable
        )
        super().__init__(groups, defaults)
        own_tensors(self.param_groups)
        self._assignment = Assignment(
            self, self._partition, model, self.capture, fallback
        )
        self._gathering = Gathering(
            self._assignment, self._world, self.capture, self._anomalies, options
        )
        self._routines = Routines(
            self.capture,
            self._gradients,
            self._anomalies,
            self._world,
            formulation,
            sample_steps,
        )
        self._fused = FusedInference(model)
        for part in (self._assignment.outputs, self._fused, self.capture):
            weakref.finalize(self, part.close)
        self._expect_gradients()
        self._assignment.watch(self._plan.layers.values())
        if self._world.leads:
            self._assignment.tell_coverage(self.routes().coverage)

    @property
    def _plan(self) -> Plan:
        return self._partition.plan

    def _expect_gradients(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self._gradients.expect({self._plan.names[p]: p for p in params})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, for instance of a layer put in later.

        Args:
            param_group: a torch-style group; it is split in two like the first.
        """
        if "updated_by" in param_group:  # one of ours, already split
            super().add_param_group(param_group)
            return
        self._routines.clear()
        known, group = self._plan.layers, user_group(param_group)
        check_names(group, self.param_groups)
        for half in self._partition.split([group], self.defaults):
            super().add_param_group(half)
        own_tensors(self.param_groups)
        self._world.changed()
        new = {n: x for n, x in self._plan.layers.items() if known.get(n) is not x}
        for name in new:
            self._anomalies.counts.pop(name, None)
        self._expect_gradients()
        self._assignment.take_up(new, known)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step of Algorithm 1.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: a gradient is sparse, there has been no backward pass yet,
                parameters have been replaced since FROG was built, `close` has been
                called, or a CUDA graph is being captured without `capturable`.
            ValueError: an entry of a group is out of range.

        Nothing has been changed where an error is raised.

        A step in which a gradient is not finite changes nothing but, on a GPU, the
        counters of calls that the host keeps; `anomalies` counts it.
        """
        refuse_to_step(self.capture.closed, self.capturable)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_updated_by(self.param_groups)
        check_groups(self.param_groups)
        known, now = None, self._circumstances()
        if now is not None:
            known = self._routines.find(now, self.state)
        if now is not None and known is not None:
            self._play(known, now)
        else:
            self._verify()
            self._take(now)
        self.capture.next_step()  # drops its samples
        self._stepped = True
        return loss

    def _circumstances(self) -> Circumstances | None:
        decided, serves = self._decided(), self._assignment.serves
        return self._routines.look(self.param_groups, self.state, decided, serves)

    def _verify(self) -> None:
        """Raise RuntimeError where no step can be made, on all ranks alike."""
        groups, partition = self.param_groups, self._partition
        check_params(groups, partition.plan.names)  # those of a known step are the same
        problem = problem_with_grads(
            groups, partition.plan.names, partition.model, self._stepped
        )
        settings = partial(partition.settings, groups)
        self._world.verify(settings, groups, problem)
        if problem is not None:
            raise RuntimeError(problem)

    def _play(self, known: KnownStep, now: Circumstances) -> None:
        """Step as was recorded."""
        if self._options.sample_steps > 1:
            weights = (w for beside in known.beside for w in beside.counted)
            self._gathering.join_samples(weights, self.state)
        found_inf: Tensor | None = self._routines.play(known, now)
        if found_inf is not None and may_read(found_inf, self.capturable):
            if found_inf:
                return
            found_inf = None
        for group, beside in zip(self.param_groups, known.beside, strict=True):
            beside.step(group, self.state, found_inf)

    def _take(self, now: Circumstances | None) -> None:
        """Step launch by launch; record that if it will come again."""
        with modes(self.param_groups, self._pages):
            known, found_inf = self._agree()
            on_host = found_inf is not None and may_read(found_inf, self.capturable)
            if on_host and found_inf:  # the step is skipped
                self._assignment.outputs.forget()
                return
            self._step(known, None if on_host else found_inf, now)
            self._assignment.learn(known, self._world.leads, self.routes)
        if self.capturable:
            self._pages.prepare()

    def _step(
        self,
        known: Known,
        found_inf: Tensor | None,
        now: Circumstances | None = None,
    ) -> None:
        """Step; where `found_inf` is not 0, change nothing."""
        groups, state, world = self.param_groups, self.state, self._world
        layers, counts = self._plan.layers.values(), self._anomalies.counts
        gathered = self._gathering.gather(known, groups, state)
        with tuned(self._tuning, layers, self.backend, world, gathered):
            for group, params, steps in gathered:
                if group["updated_by"] == "frog":
                    how = (self.formulation, counts, self._observe, found_inf)
                    self._solved |= step_rows(world, steps, group, *how)
                    self._gathering.count_steps(steps, state, found_inf)
                else:
                    fallback = FALLBACKS[group["updated_by"]]
                    own = [state[p] for p in params]
                    fallback.step(params, own, group, found_inf)
            if now is not None:
                grads = local_grads(groups, self._plan.names)
                decided = self._decided()
                self._routines.meet(now, gathered, grads, state, decided)

    def _decided(self) -> Hashable | None:
        """See `Routines`."""
        scaled = isinstance(getattr(self, "found_inf", None), Tensor)
        if self.capturable or scaled or self._observe or not self._world.alone:
            return None
        return self._assignment.settled()

    def _agree(self) -> tuple[Known, Tensor | None]:
        """What all ranks know; and not 0 where the step is to be skipped."""
        layers, names = list(self._plan.layers.values()), self._plan.names
        grads = local_grads(self.param_groups, names)
        found_inf = unscaled(self, grads.values())
        scaled = found_inf is not None  # and looked at by a GradScaler
        if not scaled:
            found_inf = self._gradients.found_inf(grads, not self.capturable)
        known = self._assignment.look(not self.capturable)
        known, found_inf = self._world.agree(layers, self.capture, known, found_inf)
        if not scaled:
            self._gradients.count_skipped(found_inf)
        return known, found_inf

    def state_dict(self) -> dict[str, Any]:
        """State of all parameters that have had a gradient, and group entries."""
        saved = {"version": STATE_VERSION, **self._assignment.saved()}
        with adding(self, saved):
            return super().state_dict()

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
        names, groups = self._plan.names, self.param_groups
        loading = Loading(names, groups, self.capturable, self._take_over)
        loading.run(self, super().load_state_dict, state_dict)

    def _take_over(self, loaded: Mapping[str, Any]) -> None:
        self._routines.clear()
        self._assignment.take_over(loaded, self.param_groups, self.state)
        self._stepped = any(
            bool(state["step"] > 0) for state in self.state.values() if "step" in state
        )

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the samples that belong to them."""
        super().zero_grad(set_to_none)
        self.drop_samples()

    def drop_samples(self) -> None:
        """Forget what has been sampled so far, and keep the gradients.

        For a pass that adds to the gradients, but is not to shape the Fisher, such as
        that of a regularizer. Samples whose gradient is gone are dropped without it,
        and derivatives inside a loss (``torch.autograd.grad``) never count.

        Examples:
            >>> consistency(model).backward()
            >>> opt.drop_samples()
            >>> loss_fn(model(x), y).backward()
            >>> opt.step()
        """
        self.capture.clear()
        self._assignment.outputs.forget()

    def close(self) -> None:
        """Remove the hooks from the model. The optimizer takes no more samples."""
        self._assignment.outputs.close()
        self._fused.close()
        self.capture.close()
        self._routines.clear()

    def __enter__(self) -> Self:
        """Nothing to do; `close` is called at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self.close()
