"""Images: where they come from, how a batch is made of them, in which order."""

from kdbench.data.batches import EvaluationBatches, TrainingBatches, batch_share
from kdbench.data.images import Images, is_cached, load_images, random_images
from kdbench.data.sources import Source, locate

__all__ = [
    "EvaluationBatches",
    "Images",
    "Source",
    "TrainingBatches",
    "batch_share",
    "is_cached",
    "load_images",
    "locate",
    "random_images",
]
