"""The generated tasks: labels are read off the pictures again, by other means than they were drawn with."""

import math

import numpy
import pytest
import tasks
import torch
from scipy import ndimage


IMAGES = 64


def foreground(image):
    """Each shape's pixels, as masks; tips of triangles may stand a pixel apart."""
    parts, found = ndimage.label(image.numpy() > 0.4, structure=numpy.ones((3, 3)))
    masks = [torch.from_numpy(parts == part) for part in range(1, found + 1)]
    return [mask for mask in masks if mask.sum() > 5]


def centre(mask):
    y, x = mask.nonzero().double().add(0.5).mean(0).tolist()
    return x, y


def direction(mask):
    """Of the longest extent, in half turns from 0 to 1."""
    y, x = mask.nonzero().double().unbind(1)
    covariance = torch.cov(torch.stack([x, y]))
    along = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    return (math.atan2(along[1], along[0]) / math.pi) % 1


READERS = {
    "count": lambda shapes: len(shapes) - 1 + 0.5,
    "position": lambda shapes: (centre(shapes[0])[0] - 7) / 42 * 8,
    "orientation": lambda shapes: direction(shapes[0]) * 8,
    "distance": lambda shapes: (math.dist(centre(shapes[0]), centre(shapes[1])) - 14) / 28 * 8,
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_labels_are_what_the_pictures_show(task):
    images, labels = tasks.generate(task, IMAGES)
    assert images.shape == (IMAGES, 56, 56) and images.min() >= 0 and images.max() <= 1
    for image, label in zip(images, labels.tolist()):
        shown = READERS[task](foreground(image))
        off = abs(shown - (label + 0.5))
        assert min(off, 8 - off if task == "orientation" else off) < 0.5 + 0.25, (shown, label)  # pixels are coarse


@pytest.mark.parametrize("task", tasks.TASKS)
def test_tasks_are_the_same_each_time_and_balanced(task):
    images, labels = tasks.generate(task, IMAGES)
    again, _ = tasks.generate(task, IMAGES)
    other, _ = tasks.generate(task, IMAGES, seed=1)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert labels.bincount().tolist() == [IMAGES // 8] * 8
    assert len(images.flatten(1).unique(dim=0)) == IMAGES
