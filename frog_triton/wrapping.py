"""What wrappers may do to a model and its optimizer: FROG needs rows where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"


def check_model(model: Any) -> None:
    """Raise for what has no rows.

    Raises:
        TypeError: it is no module.
        ValueError: a wrapper has flattened its weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "FROG takes the model itself, not its parameters: FROG(model); got "
            f"{type(model).__name__}. In transformers' Trainer: "
            "optimizer_cls_and_kwargs=(lambda: FROG, {'lr': 0.02}), before "
            "transformers 5.3 (FROG, {'model': model, 'lr': 0.02})"
        )
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    if any(f"{kind.__module__}.{kind.__qualname__}" == _FSDP1 for kind in kinds):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, which flattens weights, "
            "so that no rows are left: shard it by "
            "torch.distributed.fsdp.fully_shard, which keeps them (Accelerate and "
            "Trainer: fsdp_version 2)"
        )
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3, which flattens weights, "
                "so that no rows are left: use ZeRO stage 0, or shard the model by "
                "torch.distributed.fsdp.fully_shard, which keeps them"
            )


def check_params(
    groups: Iterable[Mapping[str, Any]], names: Mapping[nn.Parameter, str]
) -> None:
    """Raise RuntimeError where something has put its own tensors into the groups.

    Args:
        groups: parameter groups.
        names: of all parameters that FROG was given.
    """
    for i, group in enumerate(groups):
        for param in group["params"]:
            if param not in names:
                raise RuntimeError(
                    f"param_groups[{i}] holds a tensor of shape {tuple(param.shape)} "
                    "that FROG was not given: a wrapper has put it in the place of "
                    "the model's own parameters, whose rows FROG needs. DeepSpeed does "
                    "so in ZeRO stages 1 to 3, and with bf16 or fp16 enabled: use "
                    "stage 0 with torch_autocast, or fully_shard. "
                    "Accelerate's FSDP2 does so in prepare: build FROG after it"
                )


def replaced(
    groups: Iterable[Mapping[str, Any]],
    names: Mapping[nn.Parameter, str],
    model: nn.Module,
) -> str | None:
    """What is wrong if the model has other parameters than those in the groups.

    Args:
        groups: parameter groups.
        names: of their parameters, when they were given.
        model: as it is now; layers that it no longer has are not missed.
    """
    now = dict(model.named_parameters())
    held = {param for group in groups for param in group["params"]}
    for group in groups:
        for param in group["params"]:
            here = now.get(names[param], param)
            if here is not param and here not in held:  # else it was added since
                return (
                    f"{names[param]} is another parameter than when FROG was built: "
                    "build FROG after what replaces parameters, such as fully_shard, "
                    "parallelize_module or load_state_dict(assign=True)"
                )
    return None
