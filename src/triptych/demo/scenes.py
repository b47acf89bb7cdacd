"""Coloured-shape scenes: what the embedded default model looks at.

A scene is a 2 x 2 grid whose cells hold at most one coloured shape. Its *layout* (which shape in which
colour stands in which cell) decides every answer; rendering adds size, place, brightness and noise. Layouts
are split by hash into a training and a test side, so a test scene was never seen in training under any
rendering.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageChops, ImageDraw

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "white": (235, 235, 235),
}
SHAPES: Final = ("circle", "square", "triangle", "cross")
CELLS: Final = ("top left", "top right", "bottom left", "bottom right")
TEST_SHARE_PERCENT: Final = 10


@dataclass(frozen=True, order=True)
class Item:
    """One coloured shape in one cell (0 to 3, row by row)."""

    cell: int
    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """A layout: one to four items, ordered by cell."""

    items: tuple[Item, ...]

    def at(self, cell: int) -> Item | None:
        """Return the item in `cell`, or None where the cell is empty."""
        return next((item for item in self.items if item.cell == cell), None)

    @property
    def is_test(self) -> bool:
        """True where this layout belongs to the test side of the split."""
        text = ";".join(f"{item.cell}:{item.color}:{item.shape}" for item in self.items)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < TEST_SHARE_PERCENT


def random_scene(rng: random.Random, *, test: bool) -> Scene:
    """Draw a scene from the test side of the split, or from the training side."""
    while True:
        cells = sorted(rng.sample(range(4), rng.choice((1, 1, 2, 2, 3, 4))))
        scene = Scene(tuple(Item(cell, rng.choice(list(COLORS)), rng.choice(SHAPES)) for cell in cells))
        if scene.is_test == test:
            return scene


def scenes(seed: int, *, test: bool) -> Iterator[Scene]:
    """Yield an endless, reproducible stream of scenes from one side of the split."""
    rng = random.Random(seed)
    while True:
        yield random_scene(rng, test=test)


def render(scene: Scene, rng: random.Random, *, size: int = 32) -> Image.Image:
    """Draw `scene` as an RGB picture of `size` x `size` pixels, jittered and noised from `rng`."""
    oversampling = 4 if size <= 64 else 2
    canvas_size = size * oversampling
    background = rng.randint(0, 45)
    canvas = Image.new("RGB", (canvas_size, canvas_size), (background,) * 3)
    draw = ImageDraw.Draw(canvas)
    unit = canvas_size / 32
    for item in scene.items:
        radius = rng.uniform(4.5, 7.0) * unit
        center_x = ((item.cell % 2) * 16 + 8 + rng.uniform(-1, 1)) * unit
        center_y = ((item.cell // 2) * 16 + 8 + rng.uniform(-1, 1)) * unit
        brightness = rng.uniform(0.8, 1.05)
        red, green, blue = (min(255, round(channel * brightness)) for channel in COLORS[item.color])
        _draw_shape(draw, item.shape, center_x, center_y, radius, (red, green, blue))
    picture = canvas.resize((size, size), Image.Resampling.BOX)
    return _add_noise(picture, rng)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: tuple[int, int, int]
) -> None:
    match shape:
        case "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        case "square":
            half = 0.85 * radius
            draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
        case "triangle":
            base = y + 0.8 * radius
            draw.polygon(((x, y - radius), (x - radius, base), (x + radius, base)), fill=color)
        case "cross":
            arm = 0.3 * radius
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
        case _:
            raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def _add_noise(picture: Image.Image, rng: random.Random, amplitude: int = 10) -> Image.Image:
    span = 2 * amplitude + 1
    uniform = Image.frombytes("RGB", picture.size, rng.randbytes(3 * picture.width * picture.height))
    noise = uniform.point([value * span // 256 for value in range(256)] * 3)
    return ImageChops.add(picture, noise, scale=1.0, offset=-amplitude)
