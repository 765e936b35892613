"""Architectures, one file per family. `build(name, num_classes)` returns a backbone."""

from collections.abc import Callable

from kdbench.backbones import densenet, googlenet, imagenet_resnet, resnet, wide_resnet
from kdbench.backbones.base import Backbone, Branch, Features, Trunk, initialise
from kdbench.errors import unknown_name_error

__all__ = ["ARCHITECTURES", "Backbone", "Branch", "Features", "Trunk", "build", "initialise"]

ARCHITECTURES: dict[str, Callable[[int], Backbone]] = {
    **resnet.ARCHITECTURES,
    **wide_resnet.ARCHITECTURES,
    **densenet.ARCHITECTURES,
    **googlenet.ARCHITECTURES,
    **imagenet_resnet.ARCHITECTURES,
}


def build(name: str, num_classes: int) -> Backbone:
    """Build a freshly initialized backbone.

    Raises:
        UserError: The architecture is unknown.
    """
    if name not in ARCHITECTURES:
        raise unknown_name_error("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name](num_classes)
