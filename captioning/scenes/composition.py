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

    @property
    def width(self) -> float:
        """Width in shorter sides of the image."""
        return self.scale * KINDS[self.kind].extent[0]

    @property
    def height(self) -> float:
        """Height in shorter sides of the image."""
        return self.scale * KINDS[self.kind].extent[1]


def arrange(rng: random.Random, scene: dict, horizon: float) -> list[Placed]:
    """Place the things; returns the farthest first and the main ones last."""
    mains = place_mains(rng, scene, horizon)
    if scene["others"]:  # then there is one main thing
        return [place_other(rng, scene, mains[0], horizon), *mains]
    return sorted(mains, key=lambda thing: -thing.y)


def place_mains(rng: random.Random, scene: dict, horizon: float) -> list[Placed]:
    """Place the one to three main things within the square, in the air or on the ground."""
    kind, action, count = KINDS[scene["kind"]], scene["action"], scene["count"]
    size = rng.uniform(*kind.main_size) * {1: 1, 2: 0.85, 3: 0.75}[count] * (0.94 if scene["others"] else 1)
    scale = size / max(kind.extent)
    if count > 1:
        scale = min(scale, 2 * HALF_SQUARE / (count - OVERLAP * (count - 1)) / kind.extent[0])
    width, height = (scale * side for side in kind.extent)
    highest = HALF_SQUARE - height
    aloft = action in SKY_ACTIONS
    if aloft:
        y = rng.uniform(min(horizon, highest), highest)
    elif action == "bouncing":
        y = rng.uniform(-0.3, -0.2)
    else:
        y = rng.uniform(-HALF_SQUARE, min(horizon - 0.12, highest))
    step = (2 * HALF_SQUARE - width) / max(1, count - 1)  # between the left edges of neighbours
    flip = rng.random() < 0.5
    slack = max(0, 1 - width / step)  # share of a step by which neighbours are apart
    left = width / 2 - HALF_SQUARE  # the middle of a thing at the left edge
    xs = [left + (i - (i > 0) * rng.uniform(0, slack) / 2) * step for i in range(count)]
    if count == 1:
        xs = [rng.uniform(left, -left)]
    sway = 0.12 if aloft else 0.04
    ys = [clamp(y + (rng.uniform(-sway, sway) if i else 0), -HALF_SQUARE, highest) for i in range(count)]
    return [Placed(scene["kind"], scene["colour"], action, *xy, scale, flip) for xy in zip(xs, ys, strict=True)]


def place_other(rng: random.Random, scene: dict, main: Placed, horizon: float) -> Placed:
    """Place the other thing by its relation to the main one, which is moved, and shrunk where both need the room."""
    plan = scene["others"][0]
    kind, relation, side = KINDS[plan["kind"]], plan["relation"], -1 if plan["side"] == "left" else 1
    scale = kind.company_size * rng.uniform(0.92, 1.08) / max(kind.extent)
    other = Placed(plan["kind"], plan["colour"], _pose(plan, scene["setting"]), 0, 0, scale)
    if relation == "next to":
        shrink_to_fit(main, other, (2 * HALF_SQUARE + 0.06) / (main.width + other.width))
        slack = 2 * HALF_SQUARE - main.width - other.width + 0.06
        x = main.width / 2 - HALF_SQUARE + rng.uniform(0, slack)  # as if the other thing were on the right
        other.y = min(main.y + rng.uniform(0, 0.06), horizon - 0.06)
        main.x, other.x = side * x, side * (x + main.width / 2 + other.width / 2 - 0.06)
    elif relation == "in front of":
        main.x = -side * rng.uniform(0, clamp(HALF_SQUARE - main.width / 2, 0, 0.12))
        other.x = within_square(main.x + side * (main.width * 0.3 + other.width * 0.4), other.width)
        other.y = max(main.y + 0.12, horizon - 0.06)
    elif relation == "holding":
        main.flip = side < 0
        main.x = clamp(main.x, main.width / 2 - HALF_SQUARE + 0.1, HALF_SQUARE - main.width / 2 - 0.1)
        other.x, other.y = main.x + side * 0.34 * main.scale, main.y + 0.6 * main.scale  # the hand
    else:  # above or under
        shrink_to_fit(main, other, (2 * HALF_SQUARE - 0.03) / (main.height + other.height))
        other.x = within_square(main.x + side * rng.uniform(0.02, 0.2), other.width)
        slack = 2 * HALF_SQUARE - main.height - other.height - 0.02
        if relation == "under":
            main.y = -HALF_SQUARE + rng.uniform(0, min(slack, 0.12))
            other.y = rng.uniform(main.y + main.height + 0.02, HALF_SQUARE - other.height)
        else:
            other.y = -HALF_SQUARE + rng.uniform(0, min(slack, 0.04))
            main.y = max(main.y, other.y + other.height + 0.02)
    other.flip = rng.random() < 0.5
    return other


def shrink_to_fit(main: Placed, other: Placed, share: float) -> None:
    """Scale both things by the share, if it is below 1."""
    main.scale *= min(1, share)
    other.scale *= min(1, share)


def clamp(value: float, low: float, high: float) -> float:
    """Return the number nearest to `value` from `low` to `high`."""
    return min(max(value, low), high)


def within_square(x: float, width: float) -> float:
    """Return the nearest x at which a thing of this width is within the square."""
    return clamp(x, width / 2 - HALF_SQUARE, HALF_SQUARE - width / 2)


def _pose(other: dict, setting: str) -> str:
    """Return what the other thing does or, for a tree, the setting that it stands in."""
    if other["kind"] == "tree":
        return setting
    if other["kind"] == "boat":
        return "sailing" if setting == "sea" else "lying"
    return "flying" if other["relation"] == "under" else "standing"


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
