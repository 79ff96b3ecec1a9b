"""Turn the plan of a scene into a picture: place its things and paint them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from captioning.scenes.backdrops import BACKDROPS, Stage
from captioning.scenes.drawing import HAIRS, INK, MOONLIT, SKINS, SUPERSAMPLING, Paint, Pen
from captioning.scenes.things import THINGS
from captioning.scenes.world import COLOURS, KINDS, SKY_ACTIONS

HALF_SQUARE = 0.43  # half the square that holds the main thing, in shorter sides; a centre crop keeps it
OVERLAP = 0.3  # maximum share of a thing's width that the next of several covers


@dataclass
class Placed:
    """A thing with its position (x of its middle, y of its foot) and scale, in shorter sides of the image."""

    kind: str
    colour: str | None
    action: str
    x: float
    y: float
    scale: float
    flip: bool = False


def arrange(rng: random.Random, scene: dict, horizon: float) -> list[Placed]:
    """Place the things; returns the farthest first and the main ones last."""
    name, colour, action, count = scene["kind"], scene["colour"], scene["action"], scene["count"]
    kind, q = KINDS[name], HALF_SQUARE
    other = scene["others"][0] if scene["others"] else None
    relation = other["relation"] if other else None
    aloft = action in SKY_ACTIONS
    size = rng.uniform(*kind.main_size) * {1: 1, 2: 0.85, 3: 0.75}[count] * (0.94 if other else 1)
    scale = size / max(kind.extent)
    if count > 1:
        scale = min(scale, 2 * q / (count - OVERLAP * (count - 1)) / kind.extent[0])
    wide, high = (scale * side for side in kind.extent)
    low, top = -q, min(horizon - 0.12, q - high)
    if aloft:
        low, top = min(horizon, q - high), q - high
    elif action == "bouncing":
        low, top = -0.3, -0.2
    y = rng.uniform(low, top)
    room = (2 * q - wide) / max(1, count - 1)  # distance between the left edges of neighbours
    flip = rng.random() < 0.5
    xs = [wide / 2 - q + (i - (i > 0) * rng.uniform(0, max(0, 1 - wide / room)) / 2) * room for i in range(count)]
    if count == 1:
        xs = [rng.uniform(wide / 2 - q, q - wide / 2)]
    sway = 0.12 if aloft else 0.04
    ys = [min(max(y + (rng.uniform(-sway, sway) if i else 0), -q), q - high) for i in range(count)]
    placed = []
    if other:
        company = KINDS[other["kind"]]
        unit = company.company_size * rng.uniform(0.92, 1.08) / max(company.extent)
        w, h = (unit * side for side in company.extent)
        side = -1 if other["side"] == "left" else 1  # where the other thing is
        if relation == "next to":
            shrink = min(1, (2 * q + 0.06) / (wide + w))
            scale, unit, wide, w = scale * shrink, unit * shrink, wide * shrink, w * shrink
            slack = 2 * q - wide - w + 0.06
            x = -q + wide / 2 + rng.uniform(0, slack)
            ox, oy = x + wide / 2 + w / 2 - 0.06, min(ys[0] + rng.uniform(0, 0.06), horizon - 0.06)
            xs, ox = [side * x], side * ox
        elif relation == "in front of":
            xs = [-side * rng.uniform(0, max(0, min(0.12, q - wide / 2)))]
            ox = min(max(xs[0] + side * (wide * 0.3 + w * 0.4), w / 2 - q), q - w / 2)
            oy = max(ys[0] + 0.12, horizon - 0.06)
        elif relation == "holding":
            flip = side < 0
            xs = [min(max(xs[0], wide / 2 - q + 0.1), q - wide / 2 - 0.1)]
            hand = 0.6 * scale
            ox, oy = xs[0] + side * 0.34 * scale, ys[0] + hand
        else:
            shrink = min(1, (2 * q - 0.03) / (high + h))
            scale, unit, high, w, h = (length * shrink for length in (scale, unit, high, w, h))
            ox = min(max(xs[0] + side * rng.uniform(0.02, 0.2), w / 2 - q), q - w / 2)
            slack = 2 * q - high - h - 0.02
            if relation == "under":
                ys = [-q + rng.uniform(0, min(slack, 0.12))]
                oy = rng.uniform(ys[0] + high + 0.02, q - h)
            else:
                oy = -q + rng.uniform(0, min(slack, 0.04))
                ys = [max(ys[0], oy + h + 0.02)]
        pose = scene["setting"] if other["kind"] == "tree" else _pose(other, relation, scene["setting"])
        placed.append(Placed(other["kind"], other["colour"], pose, ox, oy, unit, rng.random() < 0.5))
    mains = [Placed(name, colour, action, x, y, scale, flip) for x, y in zip(xs, ys, strict=True)]
    return placed + sorted(mains, key=lambda thing: -thing.y)


def _pose(other: dict, relation: str | None, setting: str) -> str:
    """Return what the other thing does."""
    if other["kind"] == "boat":
        return "sailing" if setting == "sea" else "lying"
    return "flying" if relation == "under" else "standing"


def draw_thing(image: Image.Image, thing: Placed, scene: dict, paint: Paint, horizon: float) -> None:
    """Draw one thing with its shadow, and an outline that sets it off from the setting."""
    width, height = image.size
    shorter = min(width, height)
    kind = KINDS[thing.kind]
    x, y = width / 2 + thing.x * shorter, height / 2 - thing.y * shorter
    pen = Pen(image, x, y, thing.scale * shorter, thing.flip)
    night = scene["light"] == "night"
    floor = -0.1 if thing.action == "bouncing" else 0
    if thing.y < horizon and thing.action not in (*SKY_ACTIONS, "sailing"):
        if night:
            pen.glow(0, floor + 0.03, kind.extent[0] * 0.75, 0.17, (255, 214, 130), 0.55)
        pen.glow(0, floor + 0.01, kind.extent[0] * 0.6, 0.1, (16, 14, 36), 0.65)
    for pen.outline in (MOONLIT if night else INK, None):
        THINGS[thing.kind](pen, paint, thing.action)


def paint_scene(rng: random.Random, scene: dict) -> Image.Image:
    """Paint the picture of a plan: RGB, or mode L in greyscale, about 240 pixels on the longer side."""
    long, short = rng.choice((232, 240, 248)), rng.choice((168, 176, 180, 184, 192))
    size = (long, short) if scene["orientation"] == "landscape" else (short, long)
    image = Image.new("RGB", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    width, height = image.size
    shorter = min(width, height)
    aloft = scene["action"] in SKY_ACTIONS
    horizon = rng.uniform(-0.14, -0.06) if aloft else rng.uniform(0.0, 0.1)
    pen = Pen(image, width / 2, height / 2, shorter)
    stage = Stage(pen, rng, scene["light"], width / shorter / 2, height / shorter / 2, horizon)
    BACKDROPS[scene["setting"]](stage)
    for thing in arrange(rng, scene, horizon):
        hue = thing.colour or rng.choice(tuple(COLOURS))
        paint = Paint(COLOURS[hue], rng.choice(SKINS), rng.choice(HAIRS))
        draw_thing(image, thing, scene, paint, horizon)
    image = image.reduce(SUPERSAMPLING)
    return image.convert("L") if scene["greyscale"] else image
