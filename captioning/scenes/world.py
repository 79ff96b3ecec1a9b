"""Tables of the sample world (kinds of things, settings, actions, relations), and the plan of a scene."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from captioning.scenes.drawing import Colour

GREYSCALE_SHARE = 0.04  # share of greyscale pictures

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 40),
    "yellow": (255, 224, 40),
    "green": (22, 148, 62),
    "blue": (30, 88, 226),
    "white": (250, 250, 252),
    "black": (30, 30, 36),
}


LAND = ("beach", "street", "snow", "meadow", "city")
OPEN = ("beach", "snow", "meadow", "sea")
Actions = Mapping[str, tuple[str, ...]]  # setting -> what a thing does there
RUNNING: Actions = dict.fromkeys(LAND, ("running", "standing"))
SITTING: Actions = dict.fromkeys(LAND, ("sitting",))
GALLOPING: Actions = dict.fromkeys(LAND, ("galloping", "standing"))
PERCHING = dict.fromkeys(LAND, ("flying", "standing")) | {"sea": ("flying",)}
STROLLING: Actions = dict.fromkeys(LAND, ("walking", "standing", "waving"))
DRIVING: Actions = dict.fromkeys(LAND, ("parked", "driving"))
SAILING = {"sea": ("sailing",), "beach": ("lying",)}
FLYING: Actions = dict.fromkeys((*LAND, "sea"), ("flying",))
FLOATING: Actions = dict.fromkeys((*LAND, "sea"), ("floating",))
BOUNCING: Actions = dict.fromkeys(LAND, ("lying", "bouncing"))
STANDING: Actions = dict.fromkeys(LAND, ("standing",))
# relation -> the kinds of things that a thing can have it with
FLIERS = ("kite", "balloon", "plane")
BEHIND = {"in front of": ("house", "tree"), "under": FLIERS}
BEASTS = BEHIND | {"next to": ("bench", "tree", "ball", "umbrella", "snowman")}
PEOPLE = BEHIND | {"next to": ("bench", "tree", "dog", "snowman"), "holding": ("balloon", "umbrella")}
WHEELS = BEHIND | {"next to": ("bench", "tree", "dog", "snowman")}
SMALL = BEHIND | {"next to": ("bench", "tree", "dog", "cat", "snowman")}
MOORED = {"next to": ("lighthouse",), "under": FLIERS}
ALOFT = {"above": ("house", "tree", "bench", "car", "boat")}
# things that occur in some settings only
HAUNTS = {"snowman": ("snow",), "boat": ("sea", "beach"), "lighthouse": ("sea", "beach"), "kite": OPEN}
AT_SEA = ("boat", "lighthouse", *FLIERS)


@dataclass(frozen=True)
class Kind:
    """A kind of thing: how it is named and placed. A kind without settings is never the main thing."""

    nouns: dict[str, int]  # noun -> weight
    extent: tuple[float, float]  # width and height in its own units
    company_size: float  # its larger side as the other thing, in shorter sides of the picture
    main_size: tuple[float, float] = (0, 0)  # range of its larger side as the main thing
    max_count: int = 1
    settings: Actions = field(default_factory=dict)
    company: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coloured: bool = True
    garments: tuple[str, ...] = ()  # a person's colour is a garment's
    pronoun: str = "it"


KINDS: dict[str, Kind] = {
    "dog": Kind({"dog": 8, "puppy": 1, "pup": 1}, (1.86, 1.06), 0.26, (0.76, 0.86), 2, RUNNING, BEASTS),
    "cat": Kind({"cat": 8, "kitten": 1, "kitty": 1}, (1.04, 1.1), 0.2, (0.76, 0.86), 3, SITTING, BEASTS),
    "horse": Kind({"horse": 8, "pony": 2}, (1.5, 1.52), 0.3, (0.76, 0.86), 2, GALLOPING, WHEELS),
    "bird": Kind({"bird": 9, "songbird": 1}, (1.64, 1.36), 0.18, (0.76, 0.86), 3, PERCHING, ALOFT | SMALL),
    "man": Kind(
        {"man": 8, "guy": 1, "gentleman": 1},
        (0.76, 1.06),
        0.3,
        (0.76, 0.86),
        3,
        STROLLING,
        PEOPLE,
        garments=("coat", "jacket"),
        pronoun="him",
    ),
    "woman": Kind(
        {"woman": 8, "lady": 2},
        (0.76, 1.02),
        0.3,
        (0.76, 0.86),
        3,
        STROLLING,
        PEOPLE,
        garments=("dress", "gown"),
        pronoun="her",
    ),
    "car": Kind({"car": 9, "automobile": 1, "sedan": 1}, (2.1, 1), 0.26, (0.76, 0.86), 2, DRIVING, WHEELS),
    "bus": Kind({"bus": 8, "double decker bus": 2}, (1.5, 1), 0.3, (0.76, 0.86), 2, DRIVING, WHEELS),
    "boat": Kind({"boat": 7, "sailboat": 3}, (1.32, 1), 0.26, (0.76, 0.86), 3, SAILING, MOORED),
    "plane": Kind({"plane": 6, "airplane": 3, "jet": 1}, (2.2, 1), 0.26, (0.76, 0.86), 2, FLYING, ALOFT),
    "kite": Kind({"kite": 9, "paper kite": 1}, (0.88, 1), 0.26, (0.76, 0.86), 3, FLYING, ALOFT),
    "balloon": Kind({"balloon": 9, "toy balloon": 1}, (0.62, 1), 0.26, (0.76, 0.86), 3, FLOATING, ALOFT),
    "ball": Kind({"ball": 9, "rubber ball": 1}, (1, 1), 0.14, (0.52, 0.66), 3, BOUNCING, SMALL),
    "umbrella": Kind({"umbrella": 8, "parasol": 2}, (1.24, 1), 0.26, (0.76, 0.86), 2, STANDING, SMALL),
    "tree": Kind({"tree": 1}, (0.95, 1), 0.3, coloured=False),
    "bench": Kind({"bench": 1}, (1.6, 0.85), 0.25),
    "house": Kind({"house": 4, "cottage": 1}, (1.12, 1), 0.3),
    "snowman": Kind({"snowman": 1}, (0.5, 1.05), 0.26, coloured=False),
    "lighthouse": Kind({"lighthouse": 1}, (0.78, 1), 0.3, coloured=False),
}
MAIN_KINDS = tuple(kind for kind in KINDS if KINDS[kind].settings)
SKY_ACTIONS = ("flying", "floating")


@dataclass(frozen=True)
class Setting:
    """A setting: the words that name it, and weighted phrases for things on the ground and in the air."""

    words: tuple[str, ...]
    ground: dict[str, int]
    air: dict[str, int]
    hidden: tuple[str, ...] = ()  # colours that no thing has there, as they would not stand out
    lights: tuple[str, ...] = ("day", "day", "cloudy", "dusk")

    @property
    def colours(self) -> list[str]:
        """Names of the colours that things have in this setting."""
        return [colour for colour in COLOURS if colour not in self.hidden]


SETTINGS: dict[str, Setting] = {
    "beach": Setting(
        ("beach", "sand", "sandy", "seashore"),
        {"on the beach": 7, "on a sandy beach": 2, "on the sand": 1, "at the beach": 1},
        {"over the beach": 5, "above the beach": 2, "above a sandy beach": 1, "over the seashore": 1},
    ),
    "street": Setting(
        ("street", "road", "avenue"),
        {"on the street": 6, "on the road": 2, "in the street": 1, "on a quiet street": 1},
        {"over the street": 5, "above the street": 2, "over the road": 1, "above an avenue": 1},
    ),
    "snow": Setting(
        ("snow", "snowy", "winter"),
        {"in the snow": 7, "on the snow": 1, "in a snowy landscape": 1, "on snowy ground": 1},
        {"over the snow": 5, "above the snow": 2, "over a snowy landscape": 1, "above a winter landscape": 1},
        hidden=("white",),
    ),
    "meadow": Setting(
        ("meadow", "field", "grass", "grassy", "pasture"),
        {"in a meadow": 5, "in a grassy field": 3, "on the grass": 2, "in a pasture": 1},
        {"over a meadow": 5, "above a meadow": 2, "over a grassy field": 2, "over a pasture": 1},
        hidden=("green",),
    ),
    "city": Setting(
        ("city", "night", "downtown"),
        {"in the city at night": 7, "in a city at night": 2, "downtown at night": 2},
        {"over the city at night": 7, "above the city at night": 2, "over downtown at night": 1},
        hidden=("black", "white"),
        lights=("night",),
    ),
    "sea": Setting(
        ("sea", "ocean", "water"),
        {"on the sea": 6, "on the ocean": 2, "on the water": 2, "out at sea": 1},
        {"over the sea": 6, "above the sea": 2, "over the ocean": 2, "over the water": 1},
        hidden=("blue",),
    ),
}
LIGHTS = {
    "day": ("on a sunny day", "under a clear sky", "in the sunshine"),
    "cloudy": ("on a cloudy day", "under a cloudy sky"),
    "dusk": ("at sunset", "at dusk", "in the evening"),
    "night": ("under the moon", "by moonlight"),
}
ACTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {  # (participle, of one, of several)
    "running": (("running", "runs", "run"),),
    "galloping": (("galloping", "gallops", "gallop"), ("running", "runs", "run")),
    "standing": (("standing", "stands", "stand"),),
    "sitting": (("sitting", "sits", "sit"),),
    "walking": (("walking", "walks", "walk"), ("strolling", "strolls", "stroll")),
    "waving": (("waving", "waves", "wave"),),
    "holding": (("holding", "holds", "hold"),),
    "flying": (("flying", "flies", "fly"),),
    "floating": (("floating", "floats", "float"), ("drifting", "drifts", "drift")),
    "parked": (("parked", "is parked", "are parked"),),
    "driving": (("driving", "drives", "drive"),),
    "sailing": (("sailing", "sails", "sail"), ("floating", "floats", "float")),
    "lying": (("lying", "lies", "lie"), ("resting", "rests", "rest")),
    "bouncing": (("bouncing", "bounces", "bounce"),),
}
# relation -> phrases before the other thing with their weights, and what follows "with <the other thing>"
RELATIONS: dict[str, tuple[dict[str, int], str]] = {
    "next to": ({"next to": 6, "beside": 2, "near": 1}, "beside {}"),
    "in front of": ({"in front of": 1}, "behind {}"),
    "above": ({"above": 3, "over": 1, "high above": 1}, "below {}"),
    "under": ({"under": 3, "below": 1, "beneath": 1}, "above {}"),
    "holding": ({"": 1}, ""),
}


def plan(rng: random.Random) -> dict:
    """Draw the plan of a scene: the ground truth that is stored with the picture."""
    name = rng.choice(MAIN_KINDS)
    kind = KINDS[name]
    setting = rng.choice(tuple(kind.settings))
    action = rng.choice(kind.settings[setting])
    count = min(rng.choice((1, 1, 1, 1, 1, 1, 2, 3)), kind.max_count)
    greyscale = rng.random() < GREYSCALE_SHARE
    colours = SETTINGS[setting].colours
    colour = rng.choice(colours)
    others = []
    if count == 1 and rng.random() < 0.55:
        relation, company = rng.choice(_possible(kind, setting, action))
        if relation == "holding":
            action = "holding"
        other = rng.choice(company)
        hue = rng.choice([c for c in colours if c != colour]) if KINDS[other].coloured else None
        hue = None if greyscale else hue
        others.append({"kind": other, "colour": hue, "relation": relation, "side": rng.choice(("left", "right"))})
    return {
        "kind": name,
        "colour": None if greyscale else colour,
        "count": count,
        "action": action,
        "setting": setting,
        "others": others,
        "light": rng.choice(SETTINGS[setting].lights),
        "greyscale": greyscale,
        "orientation": rng.choice(("landscape", "landscape", "landscape", "portrait", "portrait")),
    }


def _possible(kind: Kind, setting: str, action: str) -> list[tuple[str, tuple[str, ...]]]:
    """List the relations possible in this setting and action, each with the possible other things."""
    options = []
    for relation, company in kind.company.items():
        if (action in SKY_ACTIONS) == (relation == "above"):
            there = tuple(
                other
                for other in company
                if setting in HAUNTS.get(other, SETTINGS) and (setting != "sea" or other in AT_SEA)
            )
            options.append((relation, there))
    return [option for option in options if option[1]]
