"""Colours, paint and a pen to draw pictures with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

SUPERSAMPLING = 2

Colour = tuple[int, int, int]
Point = tuple[float, float]
BEAK, ROSE, MOONLIT = (255, 170, 40), (240, 150, 160), (255, 244, 214)
INK, GLASS, WOOD, TYRE = (44, 38, 52), (190, 226, 244), (134, 88, 52), (48, 48, 54)
SKINS = ((250, 214, 184), (222, 170, 130), (142, 92, 62))
HAIRS = ((60, 40, 30), (124, 74, 38), (32, 28, 32))


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Mix colour `a` with a share of `b`."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


@cache
def at(text: str) -> list[Point]:
    """Parse points written as "x,y x,y" in hundredths of a thing's unit."""
    numbers = [[float(number) / 100 for number in pair.split(",")] for pair in text.split()]
    return [(x, y) for x, y in numbers]


@cache
def smooth(text: str) -> list[Point]:
    """Return the closed Catmull-Rom curve through the points of `at`, as a polygon."""
    points, curve = at(text), []
    for i in range(len(points)):
        corners = [points[(i + k) % len(points)] for k in (-1, 0, 1, 2)]
        for t in (0, 0.2, 0.4, 0.6, 0.8):
            x, y = (
                b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d))) / 2
                for a, b, c, d in zip(*corners, strict=True)
            )
            curve.append((x, y))
    return curve


@cache
def glow_mask() -> Image.Image:
    """Return a soft round mask that is opaque in the middle."""
    return Image.radial_gradient("L").point([max(0, round(255 - 1.45 * v)) for v in range(256)])


@dataclass
class Paint:
    """The colours that one thing is painted in."""

    base: Colour
    skin: Colour = SKINS[0]
    hair: Colour = HAIRS[0]

    @property
    def dark(self) -> Colour:
        """The base colour in shade; for black, a grey that is visible on it."""
        return mix(self.base, (0, 0, 0), 0.24) if sum(self.base) > 150 else (84, 84, 94)

    @property
    def light(self) -> Colour:
        """The base colour in light."""
        return mix(self.base, (255, 255, 255), 0.34 if sum(self.base) > 150 else 0.2)


class Pen:
    """Draws in a thing's own units: x to the right, y up, from the point (x, y) of the image.

    While `outline` is a colour, every shape is drawn in it and a little larger; filling the same shapes
    afterwards leaves a line around the whole thing.
    """

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, flip: bool = False):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.y, self.scale, self.side = x, y, scale, -1 if flip else 1
        self.outline: Colour | None = None
        self.edge = 1.3 * SUPERSAMPLING

    def place(self, points: list[Point]) -> list[Point]:
        """Convert points to pixels."""
        x, y, across, scale = self.x, self.y, self.side * self.scale, self.scale
        return [(x + across * px, y - scale * py) for px, py in points]

    def polygon(self, points: list[Point], fill: Colour) -> None:
        """Draw a filled polygon."""
        pixels = self.place(points)
        self.draw.polygon(pixels, self.outline or fill)
        if self.outline:
            joint = "curve" if len(pixels) < 9 else None
            self.draw.line([*pixels, *pixels[:2]], self.outline, round(2 * self.edge), joint)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Draw a filled ellipse around (x, y)."""
        grow = self.edge if self.outline else 0
        px, py = self.x + self.side * self.scale * x, self.y - self.scale * y
        rx, ry = rx * self.scale + grow, ry * self.scale + grow
        self.draw.ellipse((px - rx, py - ry, px + rx, py + ry), self.outline or fill)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Colour) -> None:
        """Draw a filled rectangle."""
        (x0, y0), (x1, y1) = self.place([(left, top), (right, bottom)])
        grow = self.edge if self.outline else 0
        corners = (min(x0, x1) - grow, y0 - grow, max(x0, x1) + grow, y1 + grow)
        self.draw.rectangle(corners, self.outline or fill)

    def line(self, points: list[Point], width: float, fill: Colour) -> None:
        """Draw a line with round ends; `width` is in the thing's units, but at least one pixel."""
        width = max(width * self.scale, SUPERSAMPLING) + (2 * self.edge if self.outline else 0)
        pixels = self.place(points)
        fill = self.outline or fill
        self.draw.line(pixels, fill, round(width), "curve" if len(pixels) > 2 else None)
        if width > 3 * SUPERSAMPLING:
            r = width / 2
            for x, y in (pixels[0], pixels[-1]):
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def detail(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Draw a small ellipse inside the thing, without an outline."""
        if not self.outline:
            self.oval(x, y, rx, ry, fill)

    def patch(self, points: list[Point], fill: Colour) -> None:
        """Draw a polygon inside the thing, without an outline."""
        if not self.outline:
            self.draw.polygon(self.place(points), fill)

    def glow(self, x: float, y: float, rx: float, ry: float, fill: Colour, strength: float) -> None:
        """Draw a soft spot around (x, y): sunlight, a lamp, a shadow."""
        (px, py), rx, ry = self.place([(x, y)])[0], round(rx * self.scale), round(ry * self.scale)
        mask = glow_mask().resize((2 * rx, 2 * ry), Image.Resampling.BILINEAR)
        mask = mask.point([round(v * strength) for v in range(256)])
        self.image.paste(fill, (round(px) - rx, round(py) - ry), mask)

    def bands(self, left: float, top: float, right: float, bottom: float, colours: list[Colour]) -> None:
        """Draw a rectangle whose colours change from top to bottom."""
        (x0, y0), (x1, y1) = self.place([(left, top), (right, bottom)])
        x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        column = Image.new("RGB", (1, len(colours)))
        column.putdata(colours)
        column = column.resize((1, y1 - y0), Image.Resampling.BICUBIC)
        self.image.paste(column.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST), (x0, y0))
