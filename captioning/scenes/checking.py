"""Check whether a caption of a drawn scene is right, attribute by attribute."""

from __future__ import annotations

import re
from typing import Any

from captioning.scenes.sentences import COUNT_WORDS, plural
from captioning.scenes.world import COLOURS, KINDS, RELATIONS, SETTINGS


def _any_of(words: list[str] | tuple[str, ...]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _nouns(name: str) -> list[str]:
    return [word for noun in KINDS[name].nouns for word in (noun, plural(noun))]


def _plain(caption: str) -> str:
    """Return only the words of a caption, with "grey" for "black and white", which does not name colours."""
    return re.sub(r"\bblack and white\b", "grey", " ".join(re.findall(r"[a-z]+", caption.lower())))


def _named(words: str, text: str) -> bool:
    return re.search(rf"\b{words}\b", text) is not None


def subject(caption: str) -> tuple[str | None, str | None]:
    """Find a caption's subject (the first thing it names) and the subject's colour; each is None if missing."""
    text = _plain(caption)
    first = re.search(rf"\b{_any_of(tuple(noun for name in KINDS for noun in _nouns(name)))}\b", text)
    if not first:
        return None, None
    name = next(name for name in KINDS if first[0] in _nouns(name))
    colours = _any_of(tuple(COLOURS))
    if KINDS[name].garments:
        colour = re.match(rf" (?:in|wearing|dressed in) (?:an? |the )?({colours})\b", text[first.end() :])
    else:
        colour = re.search(rf"\b({colours}) $", text[: first.start()])
    return name, colour[1] if colour else None


def is_scene(value: Any) -> bool:
    """Return whether `value` is a drawn scene's ground truth; other data sets may have another "scene"."""
    try:
        others = [(other["kind"], other["relation"], other["side"]) for other in value["others"]]
        return (
            all(kind in KINDS for kind in (value["kind"], *(kind for kind, _, _ in others)))
            and all(relation in RELATIONS for _, relation, _ in others)
            and (value["colour"] is None or value["colour"] in COLOURS)
            and value["setting"] in SETTINGS
            and isinstance(value["count"], int)
        )
    except (KeyError, TypeError):
        return False


def check(caption: str, scene: dict) -> dict[str, bool]:
    """Check a caption against a scene's ground truth, by the words of `world`: attribute -> whether it is right.

    thing: the caption's subject is the main thing. colour: its subject has the right colour. setting: it names only
    the right setting. count: it names the main thing, in the right number. company: it names no kind of thing that is
    absent (as in CHAIR, arXiv 1809.02156). relation: it states how the main thing relates to the other one.
    Attributes that a scene does not have (a colour in greyscale, a relation without another thing) are left out.
    """
    text = _plain(caption)
    name, count, others = scene["kind"], scene["count"], scene["others"]
    thing, colour = subject(caption)
    right = {"thing": thing == name}
    if scene["colour"]:
        right["colour"] = colour == scene["colour"]
    places = {place for place, setting in SETTINGS.items() if _named(_any_of(setting.words), text)}
    right["setting"] = places == {scene["setting"]}
    numbers = {number for number, words in COUNT_WORDS.items() if _named(_any_of(words), text)}
    form = _any_of([noun if count == 1 else plural(noun) for noun in KINDS[name].nouns])
    right["count"] = numbers == ({count} if count > 1 else set()) and _named(form, text)
    present = {name, *(other["kind"] for other in others)}
    right["company"] = not any(_named(_any_of(_nouns(kind)), text) for kind in KINDS if kind not in present)
    if others:
        right["relation"] = thing == name and _names_relation(text, others[0])
    return right


def _names_relation(text: str, other: dict) -> bool:
    """Return whether the text states how the main thing relates to the other one."""
    phrases, reverse = RELATIONS[other["relation"]]
    before = ["holding", "holds", "hold"] if other["relation"] == "holding" else list(phrases)
    if other["relation"] == "next to":
        before.append(f"to the {'left' if other['side'] == 'right' else 'right'} of")
    company = rf"(?:an? |the )?(?:{_any_of(tuple(COLOURS))} )?{_any_of(_nouns(other['kind']))}"
    if _named(rf"{_any_of(before)} {company}", text):
        return True
    return bool(reverse) and _named(rf"with {company} {reverse.format('(?:it|him|her|them)')}", text)
