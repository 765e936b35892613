"""The training step of published code, for comparison; the mathematics is that of kdbench."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from kdbench.method import Method
from kdbench.suite.suite import OptimizerRecipe


class NetworkByNetwork:
    """A backward pass a network and an optimizer a parameter group, as torch makes it by default;
    every loss is read when it exists.
    """

    def __init__(self, method: Method, recipe: OptimizerRecipe):
        self.method = method.to(memory_format=torch.contiguous_format).train()
        self.optimizers = [self._optimizer(network, recipe) for network in method.children()]

    def __call__(self, views: Tensor, labels: Tensor) -> dict[str, float]:
        terms = self.method(views.contiguous(), labels)
        read = {name: term.item() for name, term in terms.items()}
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses: dict[str, list[Tensor]] = defaultdict(list)
        for name, term in terms.items():
            losses[name.partition("/")[2]].append(term)
        *others, last = losses.values()
        for network in others:
            torch.stack(network).sum().backward(retain_graph=True)
        torch.stack(last).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return read

    def _optimizer(self, network: torch.nn.Module, recipe: OptimizerRecipe) -> Optimizer:
        if any(isinstance(module, torch.nn.ConvTranspose2d) for module in network.modules()):
            return Adam(network.parameters(), lr=1e-3, weight_decay=recipe.weight_decay)
        return SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
