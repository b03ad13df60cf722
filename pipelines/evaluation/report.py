"""Page of an evaluation: one HTML file that needs no network and no script.

Text that comes from films (names, prompts, reasons) is escaped, and the page's security policy allows nothing but its
own styles and inlined pictures.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from arlon.evaluation.film import QUARTERS
from arlon.evaluation.metric_table import FIGURES, GROUPS
from pipelines.evaluation.plots import Estimate, curves_plot, estimates_plot, interval_bar, strip_plot

SEAM_RULES = (1.0, 1.2)
"""Seam strength without any seam, and the largest that passes."""
SHARES = ("prompt", "quarters", "switch")
"""Groups whose figures are shares in [0, 1]."""
CARD_FIGURES = ("prompt_accuracy", "temporal_flickering", "flow_speed", "seam_strength", "drift_contrast")

_STYLE = """
:root{--ink:#1c1d21;--soft:#6b6f7b;--page:#fbfbfa;--card:#fff;--edge:#e4e4e1;--mark:#3157c9;--band:#b9c7f2;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9ec;--soft:#9da1ad;--page:#16171a;--card:#1e2024;--edge:#33363d;
--mark:#8fa8ff;--band:#3a4a86;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}h2{font-size:19px;margin:44px 0 6px}h3{font-size:14px;margin:0 0 6px}
p{margin:0 0 12px;max-width:76ch}.soft,small{color:var(--soft)}small{font-size:13px}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--edge);border-radius:8px}
table{table-layout:fixed}th:nth-child(2){width:80px}th:nth-child(3){width:150px}th:nth-child(4){width:146px}
th:nth-child(5){width:66px}th,td{text-align:left;padding:8px 12px;border-top:1px solid var(--edge);vertical-align:top}
thead th{border-top:0;font-weight:600;font-size:13px;color:var(--soft)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.none td{color:var(--soft)}code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,monospace}
.grid{stroke:var(--edge)}.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px}
figure,details,.problems{margin:0;padding:12px 14px;background:var(--card);border:1px solid var(--edge);
border-radius:8px}
figcaption{font-size:13px;font-weight:600;margin-bottom:4px}
svg text{font-size:11px;fill:var(--soft)}svg path{fill:none}.plot{width:100%;height:auto;display:block}
.line{stroke:var(--mark);stroke-width:2;stroke-linejoin:round}.thin{stroke:var(--mark);stroke-width:1;opacity:.22}
.whisker{stroke:var(--mark);stroke-width:1.5;opacity:.5}.rule{stroke:var(--bad);stroke-dasharray:4 3}
.band{stroke:var(--band);stroke-width:7}.dot{fill:var(--mark)}.bar{vertical-align:middle}
details{margin-bottom:10px}summary{cursor:pointer;display:flex;gap:8px 20px;flex-wrap:wrap;align-items:baseline}
summary b{flex:1 1 260px;font-weight:600;overflow-wrap:anywhere}summary span{font-size:13px;color:var(--soft);
font-variant-numeric:tabular-nums}details img{max-width:100%;margin-top:12px;border-radius:4px;display:block}
.problems{border-color:var(--bad)}.problems h2{margin:0 0 6px;font-size:16px;color:var(--bad)}
.problems ul{margin:0;padding-left:18px}.problems li{overflow-wrap:anywhere}
"""


def render_report(record: Mapping[str, Any], sheets: Mapping[str, bytes]) -> str:
    """Build the page.

    Args:
        record: Content of `evaluation.json`.
        sheets: Contact sheet of every film as PNG, by the key of the film.
    """
    films = record["films"]
    parts = [_heading(record), _problems(record["problems"])]
    parts += [_group(group, title, record) for group, title in GROUPS.items()]
    parts += [_by_shot(record), _over_time(record), _long_film(films), _films(films, sheets)]
    body = "\n".join(part for part in parts if part)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Evaluation of {len(films)} films</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _heading(record: Mapping[str, Any]) -> str:
    films = record["films"]
    seconds = sum(film["duration_s"] for film in films)
    noun = "film" if len(films) == 1 else "films"
    text = f"{len(films)} {noun}, {seconds:.1f} seconds in all. Measured by arlon {escape(record['arlon'])}. "
    text += "Means are over films; intervals are 95 % bootstrap intervals over the same films."
    return f'<h1>Evaluation</h1><p class="soft">{text}</p>'


def _problems(problems: Sequence[Mapping[str, str]]) -> str:
    if not problems:
        return ""
    lines = "".join(f"<li><code>{escape(p['source'])}</code> {escape(p['reason'])}</li>" for p in problems)
    noun = "problem" if len(problems) == 1 else "problems"
    return f'<div class="problems"><h2>{len(problems)} {noun}</h2><ul>{lines}</ul></div>'


def _group(group: str, title: str, record: Mapping[str, Any]) -> str:
    """Table of the figures of a group, or the reasons if no film has any of them."""
    names = [name for name, figure in FIGURES.items() if figure.group == group]
    rows = "".join(_row(name, record) for name in names)
    has_any = any(_count(name, record) for name in names)
    if not has_any and group in SHARES:
        reasons = sorted({reason for name in names for reason in record["skipped"].get(name, {})})
        return f'<h2>{escape(title)}</h2><p class="soft">Not measured: {escape("; ".join(reasons))}.</p>'
    head = '<th>figure</th><th class="n">mean</th><th class="n">95 % interval</th><th></th><th class="n">films</th>'
    return f"<h2>{escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _count(name: str, record: Mapping[str, Any]) -> int:
    return record["figures"].get(name, {}).get("count", 0)


def _row(name: str, record: Mapping[str, Any]) -> str:
    figure, share = FIGURES[name], record["figures"].get(name)
    meaning = escape(figure.meaning)
    if figure.backbone:
        used = record["backbones"].get(name)
        meaning += f" Network: {escape(figure.backbone)}" + (f"; used: {escape(used)}." if used else ".")
    label = f"<code>{name}</code><br><small>{meaning}</small>"
    if not _count(name, record):
        reasons = ", ".join(record["skipped"].get(name, {})) or "no film"
        return f'<tr class="none"><td>{label}</td><td colspan="4">not measured: {escape(reasons)}</td></tr>'
    mean, low, high = share["mean"], share["low"], share["high"]
    is_share = figure.group in SHARES and not name.endswith("_change")
    bar = interval_bar(mean, low, high) if is_share else ""
    cells = (f"{mean:.3f}", f"{low:.3f} to {high:.3f}", bar, str(share["count"]))
    kinds = (' class="n"', ' class="n"', "", ' class="n"')
    return (
        f"<tr><td>{label}</td>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True))
        + "</tr>"
    )


def _by_shot(record: Mapping[str, Any]) -> str:
    """A plot for each prompt attribute: accuracy against the position of the shot in the film."""
    plots = []
    for name, shares in record["by_shot"].items():
        estimates = [_estimate(i, share, f"shot {i}") for i, share in enumerate(shares, start=1) if share["count"]]
        ticks = [(float(i), str(i)) for i in range(1, len(shares) + 1)]
        plots.append(_figure(name, estimates_plot(estimates, x_ticks=ticks, name=f"{name} by shot")))
    return _section(
        "Prompt accuracy by shot",
        "Share right in the first, second, ... shot of each film, over the films that have one. Bars are intervals.",
        plots,
    )


def _over_time(record: Mapping[str, Any]) -> str:
    names = [f"prompt_accuracy_{quarter}" for quarter in QUARTERS]
    estimates = [
        _estimate(i, record["figures"][name], f"{quarter} quarter")
        for i, (name, quarter) in enumerate(zip(names, QUARTERS, strict=True), start=1)
        if _count(name, record)
    ]
    if not estimates:
        return ""
    ticks = [(float(i), quarter) for i, quarter in enumerate(QUARTERS, start=1)]
    plot = estimates_plot(estimates, x_ticks=ticks, name="prompt accuracy by quarter of the film")
    text = "All attributes together, by the quarter of the film that holds the middle of the shot."
    return _section("Prompt accuracy over time", text, [_figure("all attributes", plot)])


def _estimate(x: int, share: Mapping[str, Any], place: str) -> Estimate:
    label = f"{place}: {share['mean']:.3f}, {share['low']:.3f} to {share['high']:.3f}, {share['count']} films"
    return Estimate(x=x, mean=share["mean"], low=share["low"], high=share["high"], label=label)


def _long_film(films: Sequence[Mapping[str, Any]]) -> str:
    """Plots of contrast and sharpness from start to end, and of seams."""
    plots = []
    for name in ("contrast", "sharpness"):
        curves = [_over_length(film["curves"][name]) for film in films if len(film["curves"][name]) > 1]
        if curves:
            mean = _mean_curve([film["curves"][name] for film in films if len(film["curves"][name]) > 1])
            svg = curves_plot(curves, mean, x_label="of the film", name=f"{name} over the film")
            plots.append(_figure(f"{name}, thin: each film", svg))
    rows = []
    for name, label in (("seam_strength", "within a shot"), ("seam_strength_switch", "at a new prompt")):
        values = [(film["figures"][name], film["name"]) for film in films if film["figures"][name] is not None]
        rows += [(label, [(value, f"{film}: {value:.2f}") for value, film in values])] if values else []
    if rows:
        svg = strip_plot(rows, rules=SEAM_RULES, name="seam strength of every film")
        plots.append(_figure("seam strength, one dot for each film; lines at 1 and 1.2", svg))
    return _section("From start to end", "Pixels are in [0, 1]. What prompts change shows here too.", plots)


def _over_length(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(i / (len(values) - 1), value) for i, value in enumerate(values)]


def _mean_curve(curves: Sequence[Sequence[float]], num_points: int = 41) -> list[tuple[float, float]]:
    """Mean of curves of any number of values, each stretched over [0, 1]."""
    points = []
    for i in range(num_points):
        place = i / (num_points - 1)
        values = [curve[round(place * (len(curve) - 1))] for curve in curves]
        points.append((place, sum(values) / len(values)))
    return points


def _films(films: Sequence[Mapping[str, Any]], sheets: Mapping[str, bytes]) -> str:
    cards = "".join(_cards(films, sheets))
    return f"<h2>Films</h2>{cards}" if films else ""


def _cards(films: Sequence[Mapping[str, Any]], sheets: Mapping[str, bytes]) -> Iterator[str]:
    """A card for each film; only the first is open, so that a page of many films stays scannable."""
    for index, film in enumerate(films):
        facts = [f"{film['duration_s']:.1f} s", f"{film['width']} x {film['height']}"]
        shown = ((name, film["figures"][name]) for name in CARD_FIGURES)
        facts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown if value is not None]
        spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
        picture = base64.b64encode(sheets[film["key"]]).decode()
        image = f'<img alt="contact sheet" src="data:image/png;base64,{picture}">'
        is_open = " open" if index == 0 else ""
        yield f"<details{is_open}><summary><b>{escape(film['name'])}</b>{spans}</summary>{image}</details>\n"


def _section(title: str, text: str, plots: Sequence[str]) -> str:
    if not plots:
        return ""
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(text)}</p><div class="plots">{"".join(plots)}</div>'


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
