"""CUDA streams that run the networks of a cohort in parallel.

The kernels of a small network leave most of a GPU idle.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kdbench.backbones import Backbone, Features

Forward = Callable[[Tensor], Features]


class ParallelStream:
    """A network whose forward passes run on a separate CUDA stream while a step is recorded."""

    def __init__(self, network: Backbone, compiled: bool):
        self.network = network
        self.forward: Forward = self._pass
        self._forward: Forward = network.forward
        if compiled:  # networks of one architecture share the compiled code: weights are inputs
            self._forward = torch.compile(network.forward, fullgraph=True, dynamic=False)
            self.forward = torch.compiler.disable(self._pass, recursive=False)
        self._stream: torch.cuda.Stream | None = None

    def open(self, start: torch.cuda.Event, views: Tensor) -> None:
        """Run passes over these views in parallel from the event `start` on."""
        self._stream = torch.cuda.Stream()
        self._start, self._views = start, views

    def close(self) -> None:
        self._stream = None

    def _pass(self, images: Tensor) -> Features:
        if self._stream is None or not _same_memory(images, self._views):
            return self._forward(images)  # images computed within the step do not exist at `start`
        main = torch.cuda.current_stream()
        self._stream.wait_event(self._start)
        with torch.cuda.stream(self._stream):
            features = self._forward(images)
        main.wait_stream(self._stream)
        for tensor in (*features.stages, features.embedding, features.logits):
            tensor.record_stream(main)  # otherwise its memory would be reused too early
        return features


class ParallelStreams:
    """The networks of a cohort, each on its own stream.

    Each network waits only for the start of the step, and consumers of its outputs wait for it.
    Backward passes follow, because autograd runs the backward of an operation on its stream.
    """

    def __init__(self, networks: Sequence[Backbone], compiled: bool):
        self._streams = [ParallelStream(network, compiled) for network in networks]

    def __len__(self) -> int:
        return len(self._streams)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Replace the networks' forward methods within a step.

        Evaluation and export use the original methods.
        """
        for stream in self._streams:
            vars(stream.network)["forward"] = stream.forward  # shadows the method of the class
        try:
            yield
        finally:
            for stream in self._streams:
                del stream.network.forward

    @contextlib.contextmanager
    def open(self, views: Tensor) -> Iterator[None]:
        """Run the networks in parallel within the graph that is being recorded."""
        start = torch.cuda.current_stream().record_event()
        for stream in self._streams:
            stream.open(start, views)
        try:
            yield
        finally:
            for stream in self._streams:
                stream.close()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
