"""One training step: as it stands, compiled by inductor, recorded as a CUDA graph, or both."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdbench.backbones import Backbone
from kdbench.engine.parallel_streams import Lanes
from kdbench.method import ContractError
from kdbench.suite.suite import Precision

Mode = Literal["eager", "inductor", "graph", "inductor+graph"]
"""How steps run. `graph` replays forward, backward and update as one CUDA graph."""

WARM_UP = 3
"""Steps before a graph is recorded: libraries choose their algorithms, optimizers make state."""

TOLERANCE = 1e-2
"""Largest relative difference of an update, replayed against not: a wrong graph differs by 1."""


class TrainingStep:
    """Forward of all terms, one backward of their sum, one update by every optimizer.

    What cannot be compiled or recorded runs eagerly from then on, and `on_fallback` is told why.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        precision: Precision = "fp32",
        mode: Mode = "eager",
        on_fallback: Callable[[str], None] = lambda reason: None,
    ):
        self.module = module
        self.optimizers = list(optimizers)
        self.bf16 = precision == "bf16"
        self.mode = mode
        self.on_fallback = on_fallback
        self.names: tuple[str, ...] = ()
        """Of the loss terms, in order; known after the first step."""
        self._forward: Callable[[Tensor, Tensor], dict[str, Tensor]] = module
        self._inner = module.module if isinstance(module, DistributedDataParallel) else None
        compiled = "inductor" in mode
        self._lanes = self._make_lanes(compiled)
        if compiled and self._inner is not None:
            # The exchange of gradients around it cannot be traced as one graph.
            self._inner.forward = torch.compile(self._inner.forward, fullgraph=True, dynamic=False)
        elif compiled:
            whole = not self._lanes  # they are compiled by themselves, and the rest around them
            self._forward = torch.compile(module, fullgraph=whole, dynamic=False)
        self._replay: Callable[[], object] | None = None
        self._inputs: tuple[Tensor, Tensor]
        self._output: Tensor
        self.steps = 0
        """Begun so far."""

    def __call__(self, views: Tensor, labels: Tensor) -> Tensor:
        """Train on views (V, B, 3, H, W) and labels (B,); gives the weighted terms (N,).

        Nothing waits for the device. With a graph the next step overwrites the values returned.

        Raises:
            ContractError: the method returned something else than named scalar terms.
        """
        self.steps += 1
        if self.steps == 1:
            return self._first(views, labels)
        if "graph" in self.mode and self.steps > WARM_UP:
            return self._recorded(views, labels)
        return self._run(views, labels)

    def _run(self, views: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            with self._lanes.in_place():
                terms = self._forward(views, labels)
            if not self.names:
                check_terms(terms)
                self.names = tuple(terms)
            values = torch.stack(list(terms.values()))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        values.sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return values.detach()

    def _make_lanes(self, compiled: bool) -> Lanes:
        networks = [part for part in self.module.modules() if isinstance(part, Backbone)]
        several = "graph" in self.mode and len(networks) > 1
        return Lanes(networks if several else [], compiled)

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The suite's precision, for training and evaluation."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, torch.bfloat16)

    def _first(self, views: Tensor, labels: Tensor) -> Tensor:
        """Compiles; where that fails nothing has been trained yet, and the step is run eagerly."""
        if "inductor" not in self.mode:
            return self._run(views, labels)
        before = State(self.module, self.optimizers)
        try:
            return self._run(views, labels)
        except ContractError:
            raise
        except Exception as error:  # compilers raise anything; an error of the method comes again
            why = _first_line(error)
        # The error is gone by now, and with it what its frames held of the device's memory.
        before.restore()
        self._forward = self.module
        self._lanes = self._make_lanes(compiled=False)
        if self._inner is not None:
            del self._inner.forward
        values = self._run(views, labels)
        self._fall_back("graph" if "graph" in self.mode else "eager", "compiled", why)
        return values

    def _recorded(self, views: Tensor, labels: Tensor) -> Tensor:
        if self._replay is None:
            return self._record(views, labels)
        for held, new in zip(self._inputs, (views, labels), strict=True):
            held.copy_(new)
        self._replay()
        return self._output

    def _record(self, views: Tensor, labels: Tensor) -> Tensor:
        """Train a step, and record it; the record is kept only if it trains as the step did."""
        start = State(self.module, self.optimizers)
        expected = self._run(views, labels)
        end = State(self.module, self.optimizers)
        self._inputs = views.clone(), labels.clone()
        try:
            start.restore()
            replay, self._output = cuda_graph(
                lambda: self._run(*self._inputs), self._lanes.open(self._inputs[0])
            )
            replay()
            after = State(self.module, self.optimizers)
            apart = max(after.difference(end, start), _relative(self._output, expected))
            if not apart <= TOLERANCE:
                raise RuntimeError(f"its replay differs by {apart:.1e} from the step itself")
            self._replay = replay
        except RuntimeError as error:  # memory that runs out among them: a graph keeps its own
            mode: Mode = "inductor" if "inductor" in self.mode else "eager"
            self._fall_back(mode, "recorded", _first_line(error))
        finally:
            end.restore()
        return expected

    def _fall_back(self, mode: Mode, what: str, why: str) -> None:
        self.mode = mode
        self.on_fallback(f"cannot be {what}: {why}")


class State:
    """A copy of everything that a step changes: parameters, buffers, the optimizers' state."""

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]):
        optimizers = list(optimizers)
        self._tensors = state_tensors(module, optimizers)
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._optimizers = [(optimizer, set(optimizer.state)) for optimizer in optimizers]
        self._cpu = torch.get_rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """In place, so that whoever holds the tensors sees it."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        for optimizer, known in self._optimizers:
            for parameter in set(optimizer.state) - known:
                del optimizer.state[parameter]
        torch.set_rng_state(self._cpu)

    def difference(self, other: "State", start: "State") -> float:
        """Of two states that came of `start`, relative to the way from there."""
        floats = [
            (mine, theirs, old)
            for mine, theirs, old in zip(self._copies, other._copies, start._copies, strict=True)
            if mine.is_floating_point()
        ]
        apart = sum((mine - theirs).double().square().sum() for mine, theirs, _ in floats)
        way = sum((theirs - old).double().square().sum() for _, theirs, old in floats)
        return float((torch.as_tensor(apart) / torch.as_tensor(way)).sqrt())


def state_tensors(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Parameters, buffers and what the optimizers keep."""
    kept = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return [*module.parameters(), *module.buffers(), *kept]


def cuda_graph(
    step: Callable[[], Tensor], side_by_side: AbstractContextManager[None]
) -> tuple[Callable[[], object], Tensor]:
    """Record a step on the device; what replays it, and the tensor that it then writes."""
    graph = torch.cuda.CUDAGraph()
    # A loader pins memory in a thread of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), side_by_side:
        output = step()
    return graph.replay, output


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _relative(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).abs().max() / expected.abs().max())


def check_terms(terms: Any) -> None:
    """Refuse what is no dict of named scalars.

    Raises:
        ContractError: says what forward() returned instead.
    """
    if not isinstance(terms, dict) or not terms:
        raise ContractError("forward() must return a dict of named loss terms")
    for name, term in terms.items():
        if not isinstance(name, str) or not name:
            raise ContractError(f"forward() returned a loss term without a name ({name!r})")
        if not isinstance(term, Tensor) or term.dim() != 0:
            shape = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ContractError(f"forward() returned '{name}' as {shape}, not as a scalar tensor")
