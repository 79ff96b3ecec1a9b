"""Reports of the measurements: Markdown tables, and the bar charts of images/speed.png."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from captioning.backbones import TITLES


def format_table(results: dict[str, Any]) -> str:
    """Format all measurements with their ratios, followed by the profile."""
    training = results["training"]
    lines = [
        f"{results['device']}, {results['photo_count']} {results['photos']} images, {results['words']:,} words",
        "",
        *_table(["", "plain recipe", "this project", "ratio"], _against_the_recipe(results)),
        "",
        f"Training took {training['seconds']:.1f} s, and {training['seconds_with_features_stored']:.1f} s with the "
        "features already stored.",
        "",
        *_table(
            ["images/s, compared with the backbone", "captioning", "bare forward", "share", "from memory", "reading"],
            _against_the_backbone(results["captioning"]),
        ),
        "",
        *_table(
            ["steps on stored features, captions/s", "this project", "share of the LSTM's", "ratio to the recipe"],
            [
                (name, f"{one['captions_per_second']:.0f}", f"{one['share_of_lstm']:.2f}", f"{one['ratio']:.1f}")
                for name, one in results["decoders"].items()
            ],
        ),
    ]
    if peer := results["peer"]:
        lines += ["", *_table(["", "ViT-S and GPT-2 of transformers", "this project", "ratio"], _peer(peer, results))]
    for part, places in results["profile"].items():
        for place, operations in places.items():
            lines += ["", f"{part.replace('_', ' ')}, most time on the {place}:"]
            lines += [
                f"    {o['share']:6.1%} {o['seconds']:8.2f} s {o['calls']:>7} x {o['operation']}" for o in operations
            ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    first, *others = widths
    rule = [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)]
    cells = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in (head, *rows)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:])]


def _against_the_recipe(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    training, captioning, start = results["training"], results["captioning"], results["start_up"]
    recipe_images, recipe_one = captioning["recipe_photos_per_second"], captioning["recipe_seconds_for_one"]
    recipe_captions, captions = training["recipe_captions_per_second"], training["captions_per_second"]
    rows = [("training, captions/s over 3 epochs", f"{recipe_captions:.1f}", f"{captions:.0f}", training["ratio"])]
    for backbone, one in captioning["backbones"].items():
        name, rate, seconds = TITLES[backbone], one["photos_per_second"], one["seconds_for_one"]
        rows.append((f"captioning with {name}, images/s", f"{recipe_images:.1f}", f"{rate:.1f}", one["ratio"]))
        if int8 := one.get("int8_photos_per_second"):
            values = f"{recipe_images:.1f}", f"{int8:.1f}", one["int8_ratio"]
            rows.append((f"captioning with {name} in int8, images/s", *values))
        rows.append(
            (
                f"captioning one image with {name}, ms",
                f"{1000 * recipe_one:.0f}",
                f"{1000 * seconds:.0f}",
                one["ratio_for_one"],
            )
        )
    first = results["first_caption"]
    recipe_first, project_first = first["recipe_seconds"], first["seconds"]
    rows.append(
        ("one caption from the start of a program, s", f"{recipe_first:.1f}", f"{project_first:.1f}", first["ratio"])
    )
    seconds, megabytes = start["recipe_seconds"], start["recipe_peak_megabytes"]
    cold, warm, peak = start["cold_seconds"], start["warm_seconds"], start["cold_peak_megabytes"]
    rows += [
        (f"{start['captions']:,} captions ready to train on, s", f"{seconds:.1f}", f"{cold:.1f}", start["ratio_cold"]),
        ("the same, the next time, s", f"{seconds:.1f}", f"{warm:.2f}", start["ratio_warm"]),
        ("its peak memory, MB", f"{megabytes:.0f}", f"{peak:.0f}", megabytes / peak),
    ]
    return [(name, before, now, f"{ratio:.1f}") for name, before, now, ratio in rows]


def _against_the_backbone(captioning: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"{TITLES[backbone]}, {one['image_size']} pixels",
            f"{one['photos_per_second']:.1f}",
            f"{one['bare_forward_photos_per_second']:.1f}",
            f"{one['share_of_bare_forward']:.0%}",
            f"{one['encoder_from_memory_photos_per_second']:.1f}",
            f"{one['reading_photos_per_second']:.1f}",
        )
        for backbone, one in captioning["backbones"].items()
    ]


def _peer(peer: dict[str, float], results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (
            "training, captions/s",
            peer["captions_per_second"],
            results["training"]["captions_per_second"],
            peer["training_ratio"],
        ),
        (
            "captioning, images/s",
            peer["photos_per_second"],
            results["captioning"]["backbones"]["resnet50"]["photos_per_second"],
            peer["captioning_ratio"],
        ),
    ]
    return [(name, *(f"{value:.1f}" for value in values)) for name, *values in rows]


def draw(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draw the plain recipe and the project as bars, each panel in its own unit."""
    training, captioning, start = results["training"], results["captioning"], results["start_up"]
    backbones = list(captioning["backbones"].values())
    rates = {"recipe": captioning["recipe_photos_per_second"]}
    for name, one in zip(("ResNet-50", "Lite2"), backbones, strict=True):
        rates[name] = one["photos_per_second"]
        if int8 := one.get("int8_photos_per_second"):
            rates[f"{name}\nint8"] = int8
    panels: list[tuple[str, str, list[str], list[float]]] = [
        (
            "training",
            "captions/s, more is better",
            ["recipe", "project"],
            [training["recipe_captions_per_second"], training["captions_per_second"]],
        ),
        (
            "captioning",
            "images/s, more is better",
            list(rates),
            list(rates.values()),
        ),
        (
            "captioning one image",
            "ms, less is better",
            ["recipe", "ResNet-50", "Lite2"],
            [1000 * s for s in (captioning["recipe_seconds_for_one"], *(one["seconds_for_one"] for one in backbones))],
        ),
        (
            "preparing COCO's captions",
            "s, less is better",
            ["recipe", "project", "cached"],
            [start["recipe_seconds"], start["cold_seconds"], start["warm_seconds"]],
        ),
    ]
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout=ConstrainedLayoutEngine(w_pad=0.15))
    figure.suptitle(f"The plain recipe and this project on {results['device']}", fontsize=11)
    widths = [len(names) for _, _, names, _ in panels]
    for axes, (title, unit, names, values) in zip(
        figure.subplots(1, len(panels), width_ratios=widths), panels, strict=True
    ):
        bars = axes.bar(names, values, color=["#b8bcc6", *["#2f7fb8"] * (len(values) - 1)], width=0.65)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
        axes.tick_params("x", labelsize=8)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
