"""Tables, pictures and claims of the experiment `headers`."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_claims import Claim, Verdict, percent
from results_headers_numbers import (
    BEST,
    CLASSIFIER,
    FIXED,
    GOAL,
    KINDS,
    PAPER,
    PAPER_CNN,
    REMEDIES,
    SEARCHED,
    SMALL,
    Document,
    accuracy,
    averaged,
    column,
    lead,
    mean_lead,
    own_accuracy,
    places,
    small_end,
)

from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.plot_style import COLOURS, GREY, WIDTH

_STYLES = {
    CLASSIFIER: ("x", GREY),
    "linear": ("v", COLOURS[4]),
    "mlp": ("s", COLOURS[5]),
    "cnn": ("D", COLOURS[0]),
    "mixer": ("o", COLOURS[2]),
    SEARCHED: ("*", COLOURS[1]),
}


def accuracy_table(kind: str) -> Callable[[Document], list[str]]:
    """Every header on every backbone of a kind."""

    def table(document: Document) -> list[str]:
        lines = [
            f"| depth | width | {CLASSIFIER} | {' | '.join(FIXED.values())} | searched "
            "| searched minus best hand-made |",
            "|" + "---|" * (5 + len(FIXED)),
        ]
        everywhere = places(document, kind)
        if kind == "plain":
            everywhere += places(document, "embedding")
        for place in everywhere:
            own = (
                "" if place[0] == "embedding" else percent(estimate(own_accuracy(document, place)))
            )
            cells = [
                f"{place[1]:g}",
                f"{place[2]:g}",
                own,
                *(percent(estimate(accuracy(document, place, name))) for name in FIXED),
                percent(estimate(accuracy(document, place, SEARCHED))),
                percent(lead(document, place), signed=True),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    return table


def size_table(document: Document) -> list[str]:
    """Sizes, work and learning rates, over all backbones."""
    lines = ["| header | parameters | MFLOP | learning rates chosen |", "|---|---|---|---|"]
    everywhere = [place for kind in KINDS for place in places(document, kind)]
    for header, title in {**FIXED, SEARCHED: "searched"}.items():
        params, flops, rates = (
            [value for place in everywhere for value in column(document, place, header, name)]
            for name in ("params", "flops", "learning_rate")
        )
        cells = [
            title,
            _range([f"{value:,.0f}" for value in (min(params), max(params))]),
            _range([f"{value / 1e6:.3f}" for value in (min(flops), max(flops))]),
            ", ".join(f"{rate:g}" for rate in sorted(set(rates))),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _range(ends: list[str]) -> str:
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def remedy_table(document: Document) -> list[str]:
    """The smallest backbone of each kind, with every remedy."""
    lines = [
        "| backbone | | best hand-made | searched | searched minus best hand-made |",
        "|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        place = places(document, kind)[-1]
        for remedy, name in REMEDIES.items():
            ours, theirs = (
                percent(estimate(accuracy(document, place, header, remedy)))
                for header in (SEARCHED, BEST)
            )
            ahead = percent(lead(document, place, variant=remedy), signed=True)
            lines.append(f"| {title} | {name} | {theirs} | {ours} | {ahead} |")
        cnn = percent(estimate(accuracy(document, place, "cnn", "tokens for channels")))
        lines.append(f"| {title} | CNN that takes tokens for channels, as published | {cnn} | | |")
    return lines


def room_table(document: Document) -> list[str]:
    """How much the small end leaves to win at all, above the best hand-made header."""
    lines = [
        "| backbones of width and depth at most 0.5 | best hand-made | the same without a backbone "
        "| full distilled network | room up to it | searched minus best hand-made |",
        "|---|---|---|---|---|---|",
    ]
    whole = own_accuracy(document, places(document, "dynavit")[0])
    bare = accuracy(document, places(document, "embedding")[0], BEST)
    for kind, title in KINDS.items():
        where = small_end(document, kind)
        theirs = averaged([accuracy(document, place, BEST) for place in where])
        cells = [
            title,
            *(percent(estimate(values)) for values in (theirs, bare, whole)),
            percent(paired(whole, theirs), signed=True),
            percent(mean_lead(document, where), signed=True),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figure(document: Document) -> Figure:
    """Accuracy of every header over the backbones, one panel a kind.

    The axis begins below the worst header; classifiers of slices may lie under it.
    """
    drawn = Figure((WIDTH, 4.6), layout="constrained")
    drawn.suptitle(
        "Headers on frozen backbones (own classifiers of slices: mostly below the picture)",
        x=0.01, ha="left",
    )  # fmt: skip
    axes = drawn.subplots(1, len(KINDS), sharey=True)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        _draw(axis, document, kind)
        axis.set_title(title)
        axis.set_xlabel("depth, width of the backbone")
        axis.grid(axis="y", color="#eeeeee")
    trained = [
        estimate(accuracy(document, place, header))
        for kind in KINDS
        for place in places(document, kind)
        for header in (*FIXED, SEARCHED)
    ]
    lowest, highest = (pick(one.mean for one in trained) for pick in (min, max))
    axes[0].set_ylim(100 * lowest - 4.0, 100 * highest + 3.0)
    axes[0].set_ylabel("test accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6)
    return drawn


def _draw(axis: Axes, document: Document, kind: str) -> None:
    everywhere = places(document, kind)
    names = {CLASSIFIER: CLASSIFIER, **FIXED, SEARCHED: "searched"}
    for number, (header, title) in enumerate(names.items()):
        variant = CLASSIFIER if header == CLASSIFIER else "frozen"
        found = [estimate(accuracy(document, place, header, variant)) for place in everywhere]
        marker, colour = _STYLES[header]
        axis.errorbar(
            [place + 0.06 * (number - 2.5) for place in range(len(found))],
            [100 * one.mean for one in found],
            yerr=[0.0 if one.num < 2 else 100 * one.half_width for one in found],
            fmt=f"{marker}-",
            color=colour,
            lw=1.6 if header == SEARCHED else 0.9,
            ms=9 if header == SEARCHED else 5,
            elinewidth=1.0,
            label=title,
            zorder=5 if header == SEARCHED else 3,
        )
    axis.set_xticks(
        range(len(everywhere)), [f"{depth:g}, {width:g}" for _, depth, width in everywhere]
    )
    axis.tick_params(axis="x", labelrotation=45)


def claims(document: Document) -> list[Claim]:
    """Our goals, then the paper's findings about headers."""
    found = []
    for kind, title in KINDS.items():
        ahead = mean_lead(document, small_end(document, kind))
        found.append(
            Claim(
                f"headers: searched over the best hand-made one, width and depth at most "
                f"{SMALL:g} ({title})",
                "goal: +10 points on average",
                f"{percent(ahead, signed=True)} points",
                _reached(ahead, GOAL),
            )
        )
    for kind, title in KINDS.items():
        ahead = lead(document, places(document, kind)[0])
        found.append(
            Claim(
                f"headers: searched not behind the best hand-made one at full size ({title})",
                "goal: never loses",
                f"{percent(ahead, signed=True)} points",
                "fails" if ahead.sign < 0 else "holds",
            )
        )
    for kind, title in KINDS.items():
        found += _paper_claims(document, kind, title)
    return found


def _reached(ahead: Estimate, figure: float) -> Verdict:
    if ahead.mean - ahead.half_width > figure:
        return "exceeds"
    if ahead.mean >= figure:
        return "holds"
    return "partly" if ahead.sign > 0 else "fails"


def _paper_claims(document: Document, kind: str, title: str) -> list[Claim]:
    largest, *_, smallest = places(document, kind)
    wins = sum(lead(document, place, "linear").sign > 0 for place in places(document, kind))
    total = len(places(document, kind))
    at_large, at_small = (lead(document, place, "linear") for place in (largest, smallest))
    (large_linear, large_ours), (small_linear, small_ours) = PAPER.values()
    growth = paired(*([a - b for a, b in zip(accuracy(document, place, SEARCHED),
                                             accuracy(document, place, "linear"), strict=True)]
                      for place in (smallest, largest)))  # fmt: skip
    published = paired(
        accuracy(document, smallest, SEARCHED, "backbone trained"),
        accuracy(document, smallest, "cnn", "tokens for channels"),
    )
    return [
        Claim(
            f"headers: searched beats the linear one on every backbone ({title})",
            "on all 16",
            f"on {wins} of {total}",
            "holds" if wins == total else "partly" if wins else "fails",
        ),
        Claim(
            f"headers: the lead over the linear one grows as the backbone shrinks ({title})",
            f"{100 * (large_ours - large_linear):+.1f} points at full size, "
            f"{100 * (small_ours - small_linear):+.1f} at depth and width 0.25",
            f"{percent(at_large, signed=True)} and {percent(at_small, signed=True)}",
            "holds" if growth.sign > 0 else "fails",
        ),
        Claim(
            "headers: searched, with its backbone trained, over the CNN fed as published, depth "
            f"and width 0.25 ({title})",
            f"{100 * (PAPER_CNN[1] - PAPER_CNN[0]):+.1f} points",
            f"{percent(published, signed=True)} points",
            _reached(published, PAPER_CNN[1] - PAPER_CNN[0]),
        ),
    ]


TABLES: dict[str, Callable[[Document], list[str]]] = {
    **{f"headers_{kind}": accuracy_table(kind) for kind in KINDS},
    "headers_sizes": size_table,
    "headers_remedies": remedy_table,
    "headers_room": room_table,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {"headers_backbones": figure}
