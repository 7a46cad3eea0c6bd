"""report.html: what a run built, what it gained and what it cost, on one page.

The page is self-contained (styles inline, pictures embedded, nothing fetched, no scripts), so
it can be mailed, archived and printed. Its sentences are made from the numbers, also when the
numbers speak against the method.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acme_jax.plots import write_plots
from acme_jax.tables import (
    Table,
    devices_table,
    edges_table,
    methods_table,
    quality_table,
    seconds_table,
    traffic_table,
)
from acme_jax.wording import Results, compare, method, method_names, percent, quantity

_ACME = "wasserstein"
_CAPTIONS = {
    "pareto_front": (
        "The cloud's search",
        "Each dot is a sub-network that no other beats in all of error, size, latency and energy; "
        "grey squares are the uniform sub-networks; a dashed line is an edge's size budget and "
        "the numbered disc the sub-network it got.",
    ),
    "grid": (
        "One supernet, many sizes",
        "The same weights, cut to a part of their blocks (depth) and of their heads and neurons "
        "(width), still classify the public test images this well.",
    ),
    "hypervolume": (
        "Progress of the search",
        "The volume of objectives that the best sub-networks so far dominate; a flat end means "
        "that further generations found little.",
    ),
    "accuracy": (
        "Accuracy on the devices",
        "Each column is a device and each mark one method on that device's own test data; at "
        "the right each method's mean with its standard deviation over devices.",
    ),
    "similarity": (
        "Who listens to whom",
        "Each row shows how much a device uses the importance of the other devices of its edge; "
        "devices with the same labels should listen to each other.",
    ),
    "pruned": (
        "Where gates were pruned",
        "The part of each layer's gates (channels of the header) that ACME removed by the end.",
    ),
    "traffic": (
        "What travelled",
        "Bytes of every kind of message over the whole run, and the totals beside training "
        "everything in the cloud; mind the logarithmic axis.",
    ),
}
_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#5b6570;--line:#d7dce1;
--tint:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--paper:#15181c;--soft:#a3acb5;
--line:#3a4149;--tint:#1f242a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1.5rem 1.2rem 4rem;color:var(--ink);
background:var(--paper);font:16px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.25rem;margin:2.4rem 0 .6rem}
.soft,figcaption,.note{color:var(--soft);font-size:.9rem}
.headlines{background:var(--tint);border-left:4px solid #0072B2;padding:.8rem 1.2rem .8rem 2rem;
margin:1.2rem 0}.headlines li{margin:.35rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;
font-variant-numeric:tabular-nums}
th,td{padding:.25rem .45rem;text-align:right;border-bottom:1px solid var(--line);
vertical-align:top}th{vertical-align:bottom;border-bottom:2px solid var(--soft)}
.text{text-align:left}td{white-space:nowrap}td.long{white-space:normal;min-width:14rem}
figure{margin:1.6rem 0}figure img{display:block;max-width:100%;height:auto;background:#fff;
border-radius:4px}h3{font-size:1.05rem;margin:0 0 .4rem}figcaption{max-width:60rem;margin-top:.4rem}
pre{background:var(--tint);padding:.8rem;overflow-x:auto;font-size:.85rem}
@media print{:root{--ink:#000;--paper:#fff;--soft:#444;--line:#bbb;--tint:#f4f6f8}
body{max-width:none;padding:0;font-size:11px}table{font-size:8px}.scroll{overflow:visible}
th,td{padding:.12rem .25rem}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""


def write_report(
    results: Results,
    timing: Mapping[str, Any],
    directory: Path,
    config: Mapping[str, Any] | None = None,
    loading: str | None = None,
) -> Path:
    """Draws the pictures into directory/plots and writes directory/report.html.

    Args:
      results: what `results.json` holds; whatever is missing is left out of the page.
      timing: what `timing.json` holds.
      directory: the run's directory.
      config: the resolved configuration as nested dictionaries, shown when given.
      loading: Python lines that load and run one device's model, shown when given.

    Returns:
      The path of the page.
    """
    pictures = write_plots(results, directory / "plots")
    title = f"acme-jax: run {results.get('preset', '')}, seed {results.get('seed', '')}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        '<p class="soft">A simulation on one machine: one cloud, '
        f"{len(results.get('edges', ()))} edges and {len(results.get('devices', ()))} devices. "
        "Latency and energy come from a model of the devices, or from a table measured on another "
        "machine where one was given; nothing was measured on the devices.</p>",
        '<ul class="headlines">',
        *(f"<li>{html.escape(sentence)}</li>" for sentence in headlines(results, timing)),
        "</ul>",
        '<p class="soft">"Within the spread": the mean difference is no larger than its standard '
        "deviation over devices, so do not build on it.</p>",
        _table(methods_table(results)),
        _picture("accuracy", pictures),
        _table(devices_table(results)),
        _table(quality_table(results)),
        _loading(results, loading),
        _table(edges_table(results)),
        *(_picture(name, pictures) for name in ("pareto_front", "grid", "hypervolume")),
        *(_picture(name, pictures) for name in ("similarity", "pruned", "traffic")),
        _table(traffic_table(results)),
        _table(seconds_table(timing)),
        _setting(results, config),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def headlines(results: Results, timing: Mapping[str, Any]) -> list[str]:
    """The run in a few sentences, each made from the numbers alone.

    A mean difference between two methods that is no larger than its standard deviation over
    devices is called "within the spread", whichever side it favours.
    """
    sentences = [_built(results), _ranking(results)]
    if results.get("summary", {}).get(_ACME):
        sentences += [_gain(results, other) for other in ("unpersonalized", "no_pruning")]
    sentences += [_bytes(results, direction) for direction in ("uplink", "downlink")]
    sentences.append(_duration(timing))
    return [sentence for sentence in sentences if sentence]


def _built(results: Results) -> str:
    devices, full = results.get("devices", ()), results.get("full", {}).get("size_bytes")
    sizes = [d["size_bytes"] for d in devices if "size_bytes" in d]
    if not sizes:
        return ""
    edges = len({device["edge"] for device in devices})
    small, large = quantity(min(sizes), "B"), quantity(max(sizes), "B")
    text = (
        f"{len(devices)} personal models were built, one for each device at {edges} "
        f"edge{'s' * (edges != 1)}: {small if small == large else f'{small} to {large}'}"
    )
    if full:
        text += f"; the full backbone takes {quantity(full, 'B')}"
        test = results.get("reference", {}).get("test_accuracy")
        if test is not None:
            text += f" and reaches {percent(test)} % on the public test images"
    return text + "."


def _ranking(results: Results) -> str:
    summary = results.get("summary", {})
    if _ACME not in summary or len(summary) < 2:
        return ""
    ours = summary[_ACME]["mean"]
    others = [name for name in method_names(summary) if name != _ACME]
    best = max(others, key=lambda name: summary[name]["mean"])
    ahead = [name for name in others if summary[name]["mean"] > ours]
    name = f'"{method(best).label}"'
    text = f"ACME's devices reach {percent(ours)} % test accuracy on average "
    text += f"(standard deviation over devices {percent(summary[_ACME]['std'])} points), "
    if not ahead and summary[best]["mean"] < ours:
        text += f"the best mean of {len(summary)} methods; next is {name}"
    elif not ahead:
        text += f"the best mean of {len(summary)} methods, shared with {name}"
    else:
        text += f"place {len(ahead) + 1} of {len(summary)} methods: {name} is better"
    text += f" with {percent(summary[best]['mean'])} %"
    difference = compare(results, _ACME, best)
    if difference is not None and difference.mean != 0:
        text += f", {_points(difference.mean)} {'behind' if difference.mean > 0 else 'ahead'}"
        text += " (within the spread)" if difference.within_spread else " (more than the spread)"
    return text + "."


def _gain(results: Results, other: str) -> str:
    difference = compare(results, _ACME, other)
    if difference is None:
        return ""
    name = f'"{method(other).label}"'
    if difference.mean == 0:
        verb = f"Compared with {name}, ACME changes nothing on average"
    else:
        verb = f"ACME {'gains' if difference.mean > 0 else 'loses'} {_points(difference.mean)}"
        verb += f" against {name}"
    text = (
        f"{verb}: {difference.better} devices are better, {difference.worse} worse, "
        f"{difference.equal} equal; the difference varies by {_points(difference.spread)} "
        "between devices"
    )
    return text + (", so it is within the spread." if difference.within_spread else ".")


def _bytes(results: Results, direction: str) -> str:
    traffic = results.get("traffic", {})
    ours = traffic.get(f"{direction}_bytes")
    central = traffic.get(f"centralized_{direction}_bytes")
    if ours is None or not central:
        return ""
    where, what = {
        "uplink": ("Up", "sending every raw training sample to the cloud"),
        "downlink": ("Down", "sending every finished model to its device"),
    }[direction]
    text = f"{where}: {quantity(ours, 'B')} travelled, {100 * ours / central:.3g} % of the "
    text += f"{quantity(central, 'B')} for {what}"
    return text + (", so ACME sends more than that." if ours > central else ".")


def _duration(timing: Mapping[str, Any]) -> str:
    total = timing.get("total_seconds")
    if total is None:
        return ""
    compiling = sum(phase.get("compile_seconds") or 0.0 for phase in timing.get("phases", ()))
    text = f"The run took {total:.0f} s, of which {compiling:.0f} s compiling"
    memory = timing.get("peak_memory_bytes")
    return text + (f", and {quantity(memory, 'B')} of memory at most." if memory else ".")


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points"


def _table(table: Table) -> str:
    if not table.rows:
        return ""

    def cell(tag: str, text: str, column: int, bold: bool = False) -> str:
        names = ["text"] * (column in table.text_columns) + ["long"] * (len(text) > 30)
        kind = f' class="{" ".join(names)}"' if names else ""
        inner = html.escape(text)
        return f"<{tag}{kind}>{f'<b>{inner}</b>' if bold else inner}</{tag}>"

    head = "".join(cell("th", name, i) for i, name in enumerate(table.columns))
    rows = (
        "<tr>"
        + "".join(cell("td", t, i, (r, i) in table.strong) for i, t in enumerate(row))
        + "</tr>"
        for r, row in enumerate(table.rows)
    )
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + f'</tbody></table></div>\n<p class="note">{html.escape(table.note)}</p>'
    )


def _picture(name: str, pictures: Mapping[str, Path]) -> str:
    if name not in pictures:
        return ""
    title, caption = _CAPTIONS[name]
    data = base64.b64encode(pictures[name].read_bytes()).decode()
    return (
        f'<figure id="{name}">'
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _loading(results: Results, lines: str | None) -> str:
    paths = [device["model"] for device in results.get("devices", ()) if device.get("model")]
    if not paths or lines is None:
        return ""
    return (
        "<h2>Use a device's model</h2>\n<p>Each device's final model lies in a folder beside this "
        f"page: {html.escape(paths[0])} and so on. In Python, from this page's folder:</p>\n"
        f"<pre>{html.escape(lines)}</pre>"
    )


def _setting(results: Results, config: Mapping[str, Any] | None) -> str:
    facts = {
        key: results[key] for key in ("preset", "seed", "commit", "fingerprint") if key in results
    }
    for group in ("versions", "hardware"):
        facts |= {f"{group}: {key}": value for key, value in results.get(group, {}).items()}
    rows = tuple((key, str(value)) for key, value in facts.items())
    text = _table(
        Table(
            "How to repeat it",
            ("what", "value"),
            rows,
            "The same configuration, seed and versions give the same results on the same machine; "
            "the fingerprint names the configuration.",
            frozenset({0, 1}),
        )
    )
    if config is not None:
        text += f"\n<h3>Configuration</h3>\n<pre>{html.escape(json.dumps(config, indent=1))}</pre>"
    return text
