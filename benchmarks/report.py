"""The measurements as people read them: a table of Markdown, and the bars of the README."""

from __future__ import annotations

from typing import Any

import matplotlib.figure


def format_table(results: dict[str, Any]) -> str:
    """The measurements as a table of Markdown, with ratios, and the profile below it."""
    training, captioning, start = results["training"], results["captioning"], results["start_up"]
    bare, share = captioning["bare_forward_photos_per_second"], captioning["share_of_bare_forward"]
    memory, reading = (
        captioning["encoder_from_memory_photos_per_second"],
        captioning["reading_photos_per_second"],
    )
    stored = training["seconds_with_features_stored"]
    rows = [
        (
            "training, captions/s over 3 epochs",
            f"{training['recipe_captions_per_second']:.1f}",
            f"{training['captions_per_second']:.0f}",
            training["ratio"],
        ),
        (
            "captioning in batches, photos/s",
            f"{captioning['recipe_photos_per_second']:.1f}",
            f"{captioning['photos_per_second']:.1f}",
            captioning["ratio"],
        ),
        (
            "captioning one photo, ms",
            f"{1000 * captioning['recipe_seconds_for_one']:.0f}",
            f"{1000 * captioning['seconds_for_one']:.0f}",
            captioning["ratio_for_one"],
        ),
        (
            f"ready to train on {start['captions']:,} captions, s",
            f"{start['recipe_seconds']:.1f}",
            f"{start['cold_seconds']:.1f}",
            start["ratio_cold"],
        ),
        (
            "the same, the next time",
            f"{start['recipe_seconds']:.1f}",
            f"{start['warm_seconds']:.2f}",
            start["ratio_warm"],
        ),
        (
            "its peak memory, MB",
            f"{start['recipe_peak_megabytes']:.0f}",
            f"{start['cold_peak_megabytes']:.0f}",
            start["recipe_peak_megabytes"] / start["cold_peak_megabytes"],
        ),
    ]
    lines = [f"{results['device']}, {results['photo_count']} {results['photos']} photos", ""]
    lines += [f"| {'':<45} | {'plain recipe':>12} | {'this project':>12} | {'ratio':>6} |"]
    lines += [f"|-{'-' * 45}-|-{'-' * 11}:|-{'-' * 11}:|-{'-' * 5}:|"]
    lines += [f"| {name:<45} | {before:>12} | {now:>12} | {ratio:>6.1f} |" for name, before, now, ratio in rows]
    lines += [
        "",
        f"Training took {training['seconds']:.1f} s, with the features stored already {stored:.1f} s.",
        f"In photos/s: the bare backbone {bare:.1f}, of which captioning reaches {share:.0%}; the project's",
        f"encoder on photos in memory {memory:.1f}; reading photos alone {reading:.1f}.",
    ]
    for part, places in results["profile"].items():
        for place, operations in places.items():
            lines += ["", f"{part.replace('_', ' ')}, most time on the {place}:"]
            lines += [
                f"    {o['share']:6.1%} {o['seconds']:8.2f} s {o['calls']:>7} x {o['operation']}" for o in operations
            ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """The bars of the README: the plain recipe and the project, in each one's own unit."""
    training, captioning, start = results["training"], results["captioning"], results["start_up"]
    recipe_colour, colour = "#b8bcc6", "#2f7fb8"
    ms, ms_now = 1000 * captioning["recipe_seconds_for_one"], 1000 * captioning["seconds_for_one"]
    panels: list[tuple[str, str, list[float]]] = [
        (
            "training",
            "captions/s, more is better",
            [training["recipe_captions_per_second"], training["captions_per_second"]],
        ),
        (
            "captioning",
            "photos/s, more is better",
            [captioning["recipe_photos_per_second"], captioning["photos_per_second"]],
        ),
        ("captioning one photo", "ms, less is better", [ms, ms_now]),
        (
            f"ready for {start['captions']:,} captions",
            "s, less is better",
            [start["recipe_seconds"], start["cold_seconds"], start["warm_seconds"]],
        ),
    ]
    figure = matplotlib.figure.Figure(figsize=(11, 3.2), layout="constrained")
    figure.suptitle(f"The plain recipe and this project on {results['device']}", fontsize=11)
    for axes, (title, unit, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        names = ["recipe", "project"] if len(values) == 2 else ["recipe", "project", "next time"]
        bars = axes.bar(names, values, color=[recipe_colour, *[colour] * (len(values) - 1)], width=0.65)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    limit = captioning["bare_forward_photos_per_second"]
    figure.axes[1].axhline(limit, color="#555555", linestyle=":", linewidth=1)
    figure.axes[1].text(-0.4, limit, "backbone alone", fontsize=8, va="bottom", color="#555555")
    return figure
