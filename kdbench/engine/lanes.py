"""Networks of a cohort side by side: a kernel of a small one leaves most of a GPU idle."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kdbench.backbones import Backbone, Features

Forward = Callable[[Tensor], Features]


@contextlib.contextmanager
def lanes(networks: Sequence[Backbone], views: Tensor) -> Iterator[None]:
    """While a step is recorded, forward passes over its views each take a stream of their own.

    They wait for the start of the step alone, and whoever uses what they give waits for them;
    backward passes follow, since autograd runs an operation's backward on its stream.
    """
    main = torch.cuda.current_stream()
    start = main.record_event()

    def on(stream: torch.cuda.Stream, forward: Forward) -> Forward:
        def run(images: Tensor) -> Features:
            if images.untyped_storage().data_ptr() != views.untyped_storage().data_ptr():
                return forward(images)  # made within the step: not there at its start
            stream.wait_event(start)
            with torch.cuda.stream(stream):
                features = forward(images)
            main.wait_stream(stream)
            for tensor in (*features.stages, features.embedding, features.logits):
                tensor.record_stream(main)  # or its memory would be used again too early
            return features

        return run

    for network in networks:
        vars(network)["forward"] = on(torch.cuda.Stream(), network.forward)  # hides the class's
    try:
        yield
    finally:
        for network in networks:
            del network.forward
