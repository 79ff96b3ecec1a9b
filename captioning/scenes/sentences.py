"""Write captions of a scene with a small grammar."""

from __future__ import annotations

import random

from captioning.scenes.world import ACTIONS, KINDS, LIGHTS, RELATIONS, SETTINGS, SKY_ACTIONS


def weighted(rng: random.Random, weights: dict[str, int]) -> str:
    """Draw one of the keys, with the probability of its weight."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")


COUNTS = {2: {"two": 8, "a pair of": 1, "a couple of": 1}, 3: {"three": 8, "a group of three": 1}}
COUNT_WORDS = {2: ("two", "pair", "couple"), 3: ("three",)}


def _noun(rng: random.Random, name: str, colour: str | None, count: int) -> str:
    """Name a thing with its colour, without an article: "red car", "men in red coats"."""
    kind = KINDS[name]
    noun = weighted(rng, kind.nouns)
    noun = noun if count == 1 else plural(noun)
    if not colour:
        return noun
    if not kind.garments:
        return f"{colour} {noun}"
    wearing = weighted(rng, {"in": 4, "wearing": 1})
    garment = rng.choices(kind.garments, (4, 1))[0]
    if count == 1:
        return f"{noun} {wearing} {article(colour)} {garment}"
    return f"{noun} {wearing} {colour} {plural(garment)}"


# "A red car is parked next to a tree on the street at dusk." has the thing "a red car" (without its article, the noun
# "red car"), what it is doing "parked", or does "is parked", the relation " next to a tree", the place and the light.
TEMPLATES = {
    "{thing} {doing}{relation} {place}": 10,
    "{thing} {is} {doing}{relation} {place}": 6,
    "{thing} {doing}{relation} {place} {light}": 4,
    "{thing} {does}{relation} {place}": 2,
    "there {is} {thing} {doing}{relation} {place}": 3,
    "the {noun} {is} {doing}{relation} {place} {light}": 2,
    "the {noun} {does}{relation} {place}": 1,
    "a photo of {thing} {doing}{relation} {place}": 2,
    "photo of {thing} {doing}{relation} {place}": 1,
    "{place}, {thing} {is} {doing}{relation}": 1,
    "{light}, {thing} {does}{relation} {place}": 1,
    "{noun} {doing}{relation} {place}": 1,
    "a view of {thing} {doing}{relation} {place} {light}": 1,
}
GREY_TEMPLATES = {
    "a black and white photo of {thing} {doing}{relation} {place}": 8,
    "black and white photo of {thing} {doing}{relation} {place}": 2,
    "a black and white photo shows {thing} {doing}{relation} {place}": 2,
    "{thing} {doing}{relation} {place} in a black and white photo": 2,
    "there {is} {thing} {doing}{relation} {place} in this black and white photo": 1,
    "this black and white photo shows {thing} {doing}{relation} {place}": 1,
    "an old black and white photo of {thing} {doing}{relation} {place}": 1,
}
NO_PLACE_TEMPLATE = "a close up of {thing} {doing}{relation} {light}"
MAX_WORDS = 18  # maximum length of a caption


def _relation(rng: random.Random, scene: dict, other: dict) -> tuple[str, bool]:
    """Return a phrase for the main thing's relation, and whether it follows the place."""
    noun = article(_noun(rng, other["kind"], other["colour"], 1))
    phrases, reverse = RELATIONS[other["relation"]]
    if other["relation"] == "holding":
        return f" {noun}", False
    chance = rng.random()
    if other["relation"] == "next to" and chance < 0.12:
        return f" to the {'left' if other['side'] == 'right' else 'right'} of {noun}", False
    if chance > 0.88:
        return f" with {noun} {reverse.format(KINDS[scene['kind']].pronoun)}", True
    return f" {weighted(rng, phrases)} {noun}", False


def _caption(rng: random.Random, scene: dict, form: str, colour: str | None) -> str:
    """Write one sentence from the template `form`."""
    count, setting = scene["count"], SETTINGS[scene["setting"]]
    noun = _noun(rng, scene["kind"], colour, count)
    number = "" if count == 1 else weighted(rng, COUNTS[count])
    participle, of_one, of_several = rng.choices(ACTIONS[scene["action"]], (4, 1)[: len(ACTIONS[scene["action"]])])[0]
    if count > 1 and rng.random() < 0.15:
        participle += " side by side" if count == 2 else " in a row"
    relation, after = "", False
    if scene["others"] and (scene["action"] == "holding" or rng.random() < 0.85):
        relation, after = _relation(rng, scene, scene["others"][0])
    aloft = scene["action"] in SKY_ACTIONS and not (relation and not after)
    place = weighted(rng, setting.air if aloft else setting.ground)
    if after and not form.startswith("{place}"):
        form = form.replace("{relation}", "").replace("{place}", "{place}{relation}")
    parts = {
        "thing": f"{number} {noun}" if number else article(noun),
        "noun": f"{COUNT_WORDS[count][0]} {noun}" if number else noun,
        "doing": participle,
        "does": of_one if count == 1 else of_several,
        "is": "is" if count == 1 else "are",
        "relation": relation,
        "place": place,
        "light": rng.choice(LIGHTS[scene["light"]]),
    }
    caption = form.format(**parts)
    if len(caption.split()) > MAX_WORDS and form.endswith(" {light}"):
        caption = form[: -len(" {light}")].format(**parts)
    return caption[0].upper() + caption[1:] + "."


def describe(rng: random.Random, scene: dict) -> list[str]:
    """Write five different captions; at most one leaves out the colour and at most one the setting."""
    forms = GREY_TEMPLATES if scene["greyscale"] else TEMPLATES
    captions: list[str] = []
    without_colour = 1 if rng.random() < 0.3 else None
    without_place = 3 if rng.random() < 0.1 and not scene["greyscale"] else None
    left = dict(forms)
    while len(captions) < 5:
        form = weighted(rng, left)
        colour = scene["colour"]
        if len(captions) == without_colour and not form.startswith("{noun}"):
            colour = None
        if len(captions) == without_place:
            form = NO_PLACE_TEMPLATE
        caption = _caption(rng, scene, form, colour)
        if caption not in captions and len(caption.split()) <= MAX_WORDS:
            captions.append(caption)
            left.pop(form, None)
    return captions
