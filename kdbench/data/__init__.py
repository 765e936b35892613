"""Images: where they come from, how a batch is made of them, in which order."""

from kdbench.data.batches import EvaluationBatches, TrainingBatches
from kdbench.data.encoded_batches import UNJUDGED
from kdbench.data.factory import (
    Evaluation,
    ImageSet,
    Training,
    evaluation_batches,
    open_images,
    training_batches,
)
from kdbench.data.images import Images, is_cached, load_images, random_images
from kdbench.data.sources import Source, locate
from kdbench.data.workers import LoaderError

__all__ = [
    "UNJUDGED",
    "Evaluation",
    "EvaluationBatches",
    "ImageSet",
    "Images",
    "LoaderError",
    "Source",
    "Training",
    "TrainingBatches",
    "evaluation_batches",
    "is_cached",
    "load_images",
    "locate",
    "open_images",
    "random_images",
    "training_batches",
]
