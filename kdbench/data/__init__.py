"""Datasets: locating and reading images, and building batches of them."""

from kdbench.data.decoded.batches import EvaluationBatches, TrainingBatches, batch_share
from kdbench.data.decoded.images import Images, is_cached, load_images, random_images
from kdbench.data.encoded.batches import IGNORE_INDEX
from kdbench.data.encoded.workers import LoaderError
from kdbench.data.factory import (
    Evaluation,
    ImageSet,
    Training,
    data_digest,
    evaluation_batches,
    open_images,
    training_batches,
)
from kdbench.data.sources.locate import Source, locate

__all__ = [
    "IGNORE_INDEX",
    "Evaluation",
    "EvaluationBatches",
    "ImageSet",
    "Images",
    "LoaderError",
    "Source",
    "Training",
    "TrainingBatches",
    "batch_share",
    "data_digest",
    "evaluation_batches",
    "is_cached",
    "load_images",
    "locate",
    "open_images",
    "random_images",
    "training_batches",
]
