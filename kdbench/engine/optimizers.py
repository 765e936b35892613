"""Optimizers built from the suite's recipe and a method's parameter groups."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from kdbench.method import ContractError, Method, ParameterGroup
from kdbench.suite.suite import OptimizerRecipe


def build_optimizers(
    method: Method, recipe: OptimizerRecipe, capturable: bool = False
) -> list[Optimizer]:
    """Build one optimizer for each kind that the method's parameter groups name.

    Each group keeps its base learning rate as `initial_lr`.

    Args:
        method: the method to train.
        recipe: the suite's optimizer settings.
        capturable: make the optimizers safe to record in a CUDA graph.

    Raises:
        ContractError: A trainable parameter is in no group or in two.
    """
    groups = method.parameter_groups()
    members = [[p for p in group.parameters if p.requires_grad] for group in groups]
    _check_partition(method, members)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for group, parameters in zip(groups, members, strict=True):
        if parameters:
            kinds.setdefault(group.optimizer, []).append(_group(group, parameters, recipe))
    return [_optimizer(kind, members, recipe, capturable) for kind, members in kinds.items()]


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _group(
    group: ParameterGroup, parameters: list[torch.nn.Parameter], recipe: OptimizerRecipe
) -> dict[str, Any]:
    rate = recipe.learning_rate if group.learning_rate is None else group.learning_rate
    decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
    return {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}


def _optimizer(
    kind: str, groups: list[dict[str, Any]], recipe: OptimizerRecipe, capturable: bool
) -> Optimizer:
    device = groups[0]["params"][0].device
    if capturable:  # a graph would replay a Python float, so the learning rate must be a tensor
        groups = [g | {"lr": torch.tensor(g["lr"], device=device)} for g in groups]
    fused = device.type == "cuda"
    if kind == "adam":
        return Adam(groups, capturable=capturable, foreach=not fused, fused=fused)
    return SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        foreach=not fused,
        fused=fused,
    )


def _check_partition(method: Method, groups: list[list[torch.nn.Parameter]]) -> None:
    names = {parameter: name for name, parameter in method.named_parameters()}
    seen: set[torch.nn.Parameter] = set()
    for parameter in (p for group in groups for p in group):
        if parameter in seen:
            raise ContractError(f"parameter '{names.get(parameter)}' is in two parameter groups")
        seen.add(parameter)
    left_out = [n for p, n in names.items() if p.requires_grad and p not in seen]
    if left_out:
        raise ContractError(f"parameter '{left_out[0]}' is in no parameter group")
