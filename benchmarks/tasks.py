"""Generated tasks that ask for the structure of a scene, in the manner of VTAB's structured group (Zhai et al. 2019,
arXiv:1910.04867: counts and distances of CLEVR, positions and orientations of dSprites): shapes on a noisy ground,
whose size, grey level, form and place vary while one property is the label.

A task is generated anew each time, with a fixed seed, and has eight classes, which are equally frequent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


SIZE = 56  # pixels of the square images
CLASSES = 8
SHAPES = ("disc", "square", "triangle")
_SMALLEST, _LARGEST = 4.0, 7.0  # radii, in pixels


def _inside(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """How far within the shape around the origin each point is, in pixels (negative outside)."""
    if shape == "disc":
        return radius - (x.square() + y.square()).sqrt()
    sides = {"square": 4, "triangle": 3}[shape]
    inner = radius * math.cos(math.pi / sides)
    angles = [2 * math.pi * side / sides for side in range(sides)]
    return torch.stack([inner - (x * math.cos(a) + y * math.sin(a)) for a in angles]).amin(0)


class Scene:
    """A grey image, ``[SIZE, SIZE]``, to be drawn on; random choices are `generator`'s."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.image = 0.15 + 0.05 * torch.rand(SIZE, SIZE, generator=generator)
        self.y, self.x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def draw(self, x: float, y: float, radius: float, shape: str | None = None, angle: float | None = None) -> None:
        """A shape around a point, of random form and direction where none is given, with soft edges."""
        shape = shape or SHAPES[int(self.between(0, len(SHAPES)))]
        angle = self.between(0, 2 * math.pi) if angle is None else angle
        dx, dy = self.x - x, self.y - y
        along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        self._blend(_inside(shape, along, across, radius))

    def bar(self, x: float, y: float, length: float, angle: float) -> None:
        """A bar three times as long as it is wide."""
        dx, dy = self.x - x, self.y - y
        along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        self._blend(torch.minimum(length / 2 - along.abs(), length / 6 - across.abs()))

    def _blend(self, inside: Tensor) -> None:
        cover = (inside + 0.5).clamp(0, 1)
        self.image = self.image * (1 - cover) + self.between(0.5, 1.0) * cover


def count(scene: Scene, label: int) -> None:
    """One to eight shapes, apart from one another."""
    cell = SIZE / 3
    for place in torch.randperm(9, generator=scene.generator)[: label + 1].tolist():
        radius = scene.between(_SMALLEST, _LARGEST)
        room = cell / 2 - radius - 1
        x, y = (cell * (i + 0.5) + scene.between(-room, room) for i in (place % 3, place // 3))
        scene.draw(x, y, radius)


def position(scene: Scene, label: int) -> None:
    """How far to the right the shape's centre is, in eighths of where it can be."""
    low, high = _LARGEST, SIZE - _LARGEST
    x = low + (high - low) * (label + scene.between(0, 1)) / CLASSES
    scene.draw(x, scene.between(low, high), scene.between(_SMALLEST, _LARGEST))


def orientation(scene: Scene, label: int) -> None:
    """The direction of a bar, in eighths of a half turn."""
    length = scene.between(18, 26)
    x, y = (scene.between(length / 2, SIZE - length / 2) for _ in range(2))
    scene.bar(x, y, length, math.pi * (label + scene.between(0, 1)) / CLASSES)


def distance(scene: Scene, label: int) -> None:
    """How far apart the centres of two shapes are, in eighths of 14 to 42 pixels."""
    low, high = _LARGEST, SIZE - _LARGEST
    apart = 14 + 28 * (label + scene.between(0, 1)) / CLASSES
    while True:
        x, y, angle = scene.between(low, high), scene.between(low, high), scene.between(0, 2 * math.pi)
        other = x + apart * math.cos(angle), y + apart * math.sin(angle)
        if all(low <= coordinate <= high for coordinate in other):
            break
    scene.draw(x, y, scene.between(_SMALLEST, 6))
    scene.draw(*other, scene.between(_SMALLEST, 6))


TASKS: dict[str, Callable[[Scene, int], None]] = {
    "count": count, "position": position, "orientation": orientation, "distance": distance,
}  # fmt: skip


def generate(task: str, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grey images ``[N, 56, 56]`` in [0, 1] and labels ``[N]``, 0-7, of a task of `TASKS`: the same for equal seeds."""
    generator = torch.Generator().manual_seed(1000 * seed + list(TASKS).index(task))
    labels = torch.arange(images).remainder(CLASSES)[torch.randperm(images, generator=generator)]
    drawn = torch.empty(images, SIZE, SIZE)
    for image, label in zip(drawn, labels.tolist()):
        scene = Scene(generator)
        TASKS[task](scene, label)
        image.copy_(scene.image)
    return drawn, labels
