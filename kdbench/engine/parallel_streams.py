"""Networks of a cohort side by side: a kernel of a small one leaves most of a GPU idle."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kdbench.backbones import Backbone, Features

Forward = Callable[[Tensor], Features]


class Lane:
    """A network whose passes, while a step is recorded, are on a stream of its own."""

    def __init__(self, network: Backbone, compiled: bool):
        self.network = network
        self.forward: Forward = self._pass
        self._forward: Forward = network.forward
        if compiled:  # once for all that are alike: their weights are inputs to the compiler
            self._forward = torch.compile(network.forward, fullgraph=True, dynamic=False)
            self.forward = torch.compiler.disable(self._pass, recursive=False)
        self._stream: torch.cuda.Stream | None = None

    def open(self, start: torch.cuda.Event, views: Tensor) -> None:
        """From now on passes over these views start beside each other, when `start` has come."""
        self._stream = torch.cuda.Stream()
        self._start, self._views = start, views

    def close(self) -> None:
        self._stream = None

    def _pass(self, images: Tensor) -> Features:
        if self._stream is None or not _same_memory(images, self._views):
            return self._forward(images)  # made within the step: not there at its start
        main = torch.cuda.current_stream()
        self._stream.wait_event(self._start)
        with torch.cuda.stream(self._stream):
            features = self._forward(images)
        main.wait_stream(self._stream)
        for tensor in (*features.stages, features.embedding, features.logits):
            tensor.record_stream(main)  # or its memory would be used again too early
        return features


class Lanes:
    """Networks of a cohort, each in its lane.

    Each waits for the start of the step alone, and whoever uses what it gives waits for it;
    backward passes follow, since autograd runs an operation's backward on its stream.
    """

    def __init__(self, networks: Sequence[Backbone], compiled: bool):
        self._lanes = [Lane(network, compiled) for network in networks]

    def __len__(self) -> int:
        return len(self._lanes)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """For a step: evaluation and export see the networks as they are."""
        for lane in self._lanes:
            vars(lane.network)["forward"] = lane.forward  # hides the class's
        try:
            yield
        finally:
            for lane in self._lanes:
                del lane.network.forward

    @contextlib.contextmanager
    def open(self, views: Tensor) -> Iterator[None]:
        """Side by side, on the stream that is being recorded."""
        start = torch.cuda.current_stream().record_event()
        for lane in self._lanes:
            lane.open(start, views)
        try:
            yield
        finally:
            for lane in self._lanes:
                lane.close()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
