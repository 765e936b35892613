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


def with_augmentation(suite: Suite, **changes) -> Suite:
    augmentation = suite.augmentation.model_copy(update=changes)
    return suite.model_copy(update={"augmentation": augmentation})


SUITE = with_augmentation(
    load_suite("digits").model_copy(update={"batch_size": BATCH, "evaluation_batch_size": 7}),
    padding=PADDING,
    horizontal_flip=True,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)
# Noise, so that no two crops are alike; each label is the image's number. 6 are left over.
NOISE = torch.randint(256, (70, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0)).byte()
IMAGES = Images(NOISE, torch.arange(70))
Batch = tuple[Tensor, Tensor]


def epoch(number=0, seed=0, views=1, suite=SUITE, **place) -> list[tuple[Tensor, Tensor]]:
    return list(TrainingBatches(IMAGES, suite, seed, views, **place).epoch(number))


def normalised(labels: Tensor) -> Tensor:
    """Normalize the images of some labels with plain arithmetic."""
    mean, std = torch.tensor(SUITE.augmentation.mean), torch.tensor(SUITE.augmentation.std)
    return ((NOISE[labels] / 255 - mean) / std).permute(0, 3, 1, 2)


def draws_of(view: Tensor, labels: Tensor, padding: int = PADDING) -> Tensor:
    """Return the only (top, left, flip) that turns each image into that of the view."""
    padded = F.pad(normalised(labels), (padding,) * 4, mode="reflect")
    offsets = range(2 * padding + 1)
    draws = torch.cartesian_prod(torch.tensor(offsets), torch.tensor(offsets), torch.arange(2))
    found = []
    for top, left, flip in draws.tolist():
        crop = padded[..., top : top + SIZE, left : left + SIZE]
        off = (crop.flip(3) if flip else crop) - view
        found.append(off.abs().amax(dim=(1, 2, 3)) < 5e-5)
    assert torch.stack(found).sum(dim=0).unique().tolist() == [1]
    return draws[torch.stack(found).int().argmax(dim=0)]


def test_every_crop_and_both_directions_occur_independently_of_each_other():
    steps = epoch(views=2)
    draws = torch.stack([torch.stack([draws_of(v[i], y) for v, y in steps]) for i in (0, 1)])
    assert draws.shape == (2, 4, BATCH, 3)  # (top, left, flip) per view, step and sample
    flat = draws.reshape(-1, 3)
    for axis, choices in enumerate((2 * PADDING + 1, 2 * PADDING + 1, 2)):
        counts = flat[:, axis].bincount(minlength=choices)
        assert len(counts) == choices and counts.min() > 0.5 * len(flat) / choices
    correlation = torch.corrcoef(flat.T.float()) - torch.eye(3)
    assert correlation.abs().max() < 0.3
    for batch in draws.flatten(0, 1):
        assert len(batch.unique(dim=0)) > BATCH / 2
    assert (draws[0] != draws[1]).any(dim=-1).float().mean() > 0.8


def test_disabled_augmentations_are_not_applied():
    views, labels = epoch(suite=with_augmentation(SUITE, padding=0))[0]
    assert draws_of(views[0], labels, padding=0).unique(dim=0).tolist() == [[0, 0, 0], [0, 0, 1]]
    views, labels = epoch(suite=with_augmentation(SUITE, horizontal_flip=False))[0]
    assert not draws_of(views[0], labels)[:, 2].any()


def test_order_and_view_0_are_the_same_whatever_the_number_of_views():
    for one, three in zip(epoch(views=1), epoch(views=3), strict=True):
        assert torch.equal(one[0][0], three[0][0]) and torch.equal(one[1], three[1])


def test_an_epoch_depends_neither_on_earlier_draws_nor_on_its_first_step():
    batches = TrainingBatches(IMAGES, SUITE, 5, 2)
    for number in range(3):
        list(batches.epoch(number))
    torch.manual_seed(1)
    whole = epoch(3, seed=5, views=2)
    for start in (0, 1):
        for one, other in zip(batches.epoch(3, start=start), whole[start:], strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}])
def test_other_epochs_and_seeds_have_another_order_and_other_draws(other):
    (views, labels), (changed_views, changed_labels) = epoch()[0], epoch(**other)[0]
    assert (labels != changed_labels).float().mean() > 0.8
    draws, changed = draws_of(views[0], labels), draws_of(changed_views[0], changed_labels)
    assert (draws != changed).any(dim=1).float().mean() > 0.8


def test_an_epoch_visits_distinct_images_in_whole_batches():
    views, labels = epoch(views=2)[0]
    assert views.shape == (2, BATCH, 3, SIZE, SIZE) and views.dtype == torch.float32
    assert views[0].is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (BATCH,) and labels.dtype == torch.int64
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
            torch.testing.assert_close(pixels, normalised(labels), rtol=1e-5, atol=1e-5)
            seen += labels.tolist()
    assert sorted(seen) == list(range(count))
    assert processes > 1 or seen == list(range(count))
