"""Batches of images in memory: augmentation, order, and division among processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data import EvaluationBatches, Images, TrainingBatches
from kdbench.errors import UserError
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

PADDING, SIZE, BATCH = 2, 8, 16
DIGITS = load_suite("digits")
SUITE = DIGITS.model_copy(
    update={
        "batch_size": BATCH,
        "evaluation_batch_size": 7,
        "augmentation": DIGITS.augmentation.model_copy(
            update={
                "padding": PADDING,
                "horizontal_flip": True,
                "mean": (0.5, 0.4, 0.3),
                "std": (0.2, 0.3, 0.4),
            }
        ),
    }
)
# Noise, so that no two crops are alike; each label is the image's number. 6 are left over.
NOISE = torch.randint(
    0, 256, (70, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
IMAGES = Images(NOISE, torch.arange(70))
Epoch = list[tuple[Tensor, Tensor]]


def epoch(number: int = 0, seed: int = 0, views: int = 1, suite: Suite = SUITE, **place) -> Epoch:
    return list(TrainingBatches(IMAGES, suite, seed, views, **place).epoch(number))


def with_augmentation(**changes) -> Suite:
    return SUITE.model_copy(update={"augmentation": SUITE.augmentation.model_copy(update=changes)})


def normalised(image: Tensor) -> Tensor:
    """Normalize one (3, H, W) image with plain arithmetic."""
    mean = torch.tensor(SUITE.augmentation.mean)[:, None, None]
    std = torch.tensor(SUITE.augmentation.std)[:, None, None]
    return (image / 255 - mean) / std


def draw_of(view: Tensor, label: Tensor, padding: int = PADDING) -> tuple[int, int, bool]:
    """Return the only (top, left, flip) that turns the image `label` into the view."""
    image = normalised(NOISE[label].permute(2, 0, 1).float())
    padded = F.pad(image[None], (padding,) * 4, mode="reflect")[0]
    found = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + SIZE, left : left + SIZE]
            for flip in (False, True):
                if torch.allclose(view, crop.flip(2) if flip else crop, atol=1e-5):
                    found.append((top, left, flip))
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """Draws (top, left, flip) per view, step and sample of one epoch with two views."""
    return torch.tensor(
        [
            [
                [draw_of(view, label) for view, label in zip(batch, labels, strict=True)]
                for batch in views
            ]
            for views, labels in epoch(views=2)
        ]
    ).transpose(0, 1)


def test_a_batch_holds_padded_cropped_flipped_and_normalised_images(draws):
    assert draws.shape == (2, 4, BATCH, 3)
    views, labels = epoch(views=2)[0]
    assert views.shape == (2, BATCH, 3, SIZE, SIZE) and views.dtype == torch.float32
    assert views[0].is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (BATCH,) and labels.dtype == torch.int64


def test_every_crop_and_both_directions_occur_independently_of_each_other(draws):
    flat = draws.reshape(-1, 3)
    for axis, choices in enumerate((2 * PADDING + 1, 2 * PADDING + 1, 2)):
        counts = flat[:, axis].bincount(minlength=choices)
        assert len(counts) == choices
        assert counts.min() > 0.5 * len(flat) / choices
    correlation = torch.corrcoef(flat.T.float()) - torch.eye(3)
    assert correlation.abs().max() < 0.3


def test_samples_and_views_have_independent_draws(draws):
    for batch in draws.flatten(0, 1):
        assert len(batch.unique(dim=0)) > BATCH / 2
    assert (draws[0] != draws[1]).any(dim=-1).float().mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"padding": 0}, {(0, 0, False), (0, 0, True)}), ({"horizontal_flip": False}, None)],
)
def test_disabled_augmentations_are_not_applied(changes, allowed):
    views, labels = epoch(suite=with_augmentation(**changes))[0]
    padding = changes.get("padding", PADDING)
    found = {draw_of(*pair, padding=padding) for pair in zip(views[0], labels, strict=True)}
    assert found == allowed if allowed else not any(flip for *_, flip in found)


def test_order_and_view_0_are_the_same_whatever_the_number_of_views():
    for one, three in zip(epoch(views=1), epoch(views=3), strict=True):
        assert torch.equal(one[1], three[1])
        assert torch.equal(one[0][0], three[0][0])


@pytest.mark.parametrize("start", [0, 1])
def test_an_epoch_depends_neither_on_earlier_draws_nor_on_its_first_step(start):
    batches = TrainingBatches(IMAGES, SUITE, 5, 2)
    for number in range(3):
        list(batches.epoch(number))
    torch.manual_seed(1)
    whole = epoch(3, seed=5, views=2)
    for one, other in zip(batches.epoch(3, start=start), whole[start:], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}])
def test_other_epochs_and_seeds_have_another_order_and_other_draws(other):
    (views, labels), (changed_views, changed_labels) = epoch()[0], epoch(**other)[0]
    assert (labels != changed_labels).float().mean() > 0.8
    draws = [draw_of(*pair) for pair in zip(views[0], labels, strict=True)]
    changed = [draw_of(*pair) for pair in zip(changed_views[0], changed_labels, strict=True)]
    assert sum(a != b for a, b in zip(draws, changed, strict=True)) > 0.8 * BATCH


def test_an_epoch_visits_distinct_images_in_whole_batches():
    seen = torch.cat([labels for _, labels in epoch()])
    assert len(TrainingBatches(IMAGES, SUITE, 0, 1)) == len(epoch()) == 4
    assert len(seen.unique()) == len(seen) == 64
    assert not torch.equal(seen.sort().values, seen)
    left_out = {*range(70)} - {*seen.tolist()}
    assert left_out != {*range(70)} - {*torch.cat([y for _, y in epoch(1)]).tolist()}


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_all_processes_make_the_global_batch(processes):
    parts = [epoch(views=2, rank=rank, processes=processes) for rank in range(processes)]
    for whole, *slices in zip(epoch(views=2), *parts, strict=True):
        assert torch.equal(torch.cat([views for views, _ in slices], dim=1), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in slices]), whole[1])


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused():
    with pytest.raises(UserError, match=r"batch size 16 .* does not divide by 3 processes"):
        TrainingBatches(IMAGES, SUITE, 0, 1, rank=0, processes=3)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [70, 20, 2])
def test_evaluation_shows_each_image_once_and_only_normalises(processes, count):
    some = Images(NOISE[:count], torch.arange(count))
    seen = []
    for rank in range(processes):
        for pixels, labels in EvaluationBatches(some, SUITE, rank, processes):
            assert len(labels) <= SUITE.evaluation_batch_size
            assert pixels.shape == (len(labels), 3, SIZE, SIZE)
            for image, label in zip(pixels, labels, strict=True):
                by_hand = normalised(NOISE[label].permute(2, 0, 1).float())
                assert torch.allclose(image, by_hand, atol=1e-5)
            seen += labels.tolist()
    assert sorted(seen) == list(range(count))
    assert processes > 1 or seen == list(range(count))
