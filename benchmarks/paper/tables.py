"""Records of films -> a table with intervals, as Markdown and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arlon.evaluation.cases import PROMPT_ATTRIBUTES, Share, summarise
from benchmarks.paper.conditions import Record
from benchmarks.paper.experiments import QUARTER_FIGURES, Experiment

TABLES, PARTIAL_TABLES = Path("docs/results"), Path("outputs/paper/tables")
"""Folders for tables: complete ones of the model in the repository, and all others."""
PAIRS = {"held out": True, "may be trained on": False}
"""Whether a shot shows an attribute pair that training never shows."""
JOIN_FIGURES = (
    *("switch_appears", "kept_colour", "kept_shape", "kept_motion", "kept_background", "kept_place"),
    "seam_strength_switch",
)
"""Figures of a shot that describe how it continues the one before."""
Results = Mapping[str, Sequence[Record]]
"""Records by the name of their condition."""


def figure_shares(records: Sequence[Record], names: Sequence[str]) -> dict[str, Share]:
    """Mean and bootstrap interval over films of the figures named."""
    return summarise([{name: _number(record["figures"][name]) for name in names} for record in records])


def figure_differences(records: Sequence[Record], others: Sequence[Record], names: Sequence[str]) -> dict[str, Share]:
    """Mean and bootstrap interval, over films, of the figures of `records` less those of the same films in `others`."""
    return summarise(
        [
            {name: _number(record["figures"][name]) - _number(other["figures"][name]) for name in names}
            for record, other in zip(records, others, strict=True)
        ]
    )


def figures_by_shot(records: Sequence[Record]) -> dict[str, list[Share]]:
    """Figures at each position of a shot, over films: accuracy of each attribute, of all together, and of joins.

    `accuracy` is the mean of what a prompt states; direction is part of motion, as in the figure `prompt_accuracy`.
    """
    positions = range(min(len(record["shots"]) for record in records))
    shares = [summarise([_shot_scores(record["shots"][position]) for record in records]) for position in positions]
    return {name: [of_shot[name] for of_shot in shares] for name in shares[0]}


def accuracy_by_pair(records: Sequence[Record], *, held_out: bool) -> dict[str, Share]:
    """Prompt accuracy in the shots after the first that show a held-out attribute pair, or in those that show none.

    Means over such shots of a film, then over the films that have any: of each attribute, and as `accuracy` of all.
    """
    films = []
    for record in records:
        shots = zip(record["shots"][1:], record["asked"][1:], strict=True)
        rows = [_shot_scores(shot) for shot, asked in shots if asked["held_out"] == held_out]
        films.append({name: _mean(row[name] for row in rows) for name in ("accuracy", *PROMPT_ATTRIBUTES)})
    return summarise(films)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _shot_scores(shot: Mapping[str, float | None]) -> dict[str, float]:
    scores = {name: _number(shot.get(name)) for name in PROMPT_ATTRIBUTES}
    joins = {name: _number(shot.get(name)) for name in JOIN_FIGURES}
    return {"accuracy": _mean(value for name, value in scores.items() if name != "direction")} | scores | joins


def cost(records: Sequence[Record]) -> dict[str, float]:
    """Medians over films: seconds a second of film, the share of the AR model in them, calls of the DiT a film."""
    per_second = sorted(r["seconds"]["total"] / r["seconds"]["film"] for r in records)
    share = sorted(r["seconds"]["code"] / r["seconds"]["total"] for r in records)
    middle = len(records) // 2
    calls = sorted(r["calls"] for r in records)[middle]
    return {"seconds_per_second": per_second[middle], "ar_share": share[middle], "dit_calls": calls}


def to_json(
    experiment: Experiment, results: Results, model: Mapping[str, str], training: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The table, and the figures of it for every film, to four digits; `training` is that of the variants."""
    rows = {}
    for name, records in results.items():
        shares = figure_shares(records, experiment.figures)
        rows[name] = {
            "figures": {key: _plain(share) for key, share in shares.items()},
            "by_shot": {key: [_plain(share) for share in row] for key, row in figures_by_shot(records).items()},
            "by_pair": {
                kind: {key: _plain(share) for key, share in accuracy_by_pair(records, held_out=held_out).items()}
                for kind, held_out in PAIRS.items()
            },
            "cost": cost(records),
            "films": [
                _rounded({**r, "figures": {key: r["figures"][key] for key in experiment.figures}}) for r in records
            ],
        }
    differences = [
        {"of": name, "less": other, "figures": {key: _plain(share) for key, share in shares.items()}}
        for (name, other), shares in _compared(experiment, results).items()
    ]
    about = {"title": experiment.title, "claim": experiment.claim, "model": dict(model)}
    about |= {"training": dict(training)} if training else {}
    return about | {"conditions": rows, "differences": differences}


def to_markdown(
    experiment: Experiment,
    results: Results,
    model: Mapping[str, str],
    command: str,
    trained: str | None = None,
) -> str:
    """The table as Markdown; `trained` says how the variants were."""
    count = min(len(records) for records in results.values())
    later = [asked for record in next(iter(results.values())) for asked in record["asked"][1:]]
    held_out = sum(asked["held_out"] for asked in later)
    num_shots = len(experiment.segments)
    where = f" in the first shot and in {held_out} of {len(later)} later ones" if later else ""
    lines = [
        f"# {experiment.title}",
        "",
        f"The paper: {experiment.claim}",
        "",
        f"{count} films of {num_shots} shot{'s' * (num_shots > 1)}"
        f"{' and two objects' * (experiment.two_objects_prob == 1)}, held-out phrasings, held-out "
        f"attribute pairs{where}, the same ones under every condition; model "
        f"{model['name']} ({model['hash'][:12]}). Mean and "
        f"95 % bootstrap interval over films. Made by `{command}`.",
        "",
        *([f"Each injection {trained}.", ""] if trained else []),
        *_figure_table(experiment, results),
    ]
    if compared := _compared(experiment, results):
        lines += ["", "Differences film by film, mean and interval:", "", *_difference_table(compared)]
    if any(name in QUARTER_FIGURES for name in experiment.figures):
        lines += ["", "Each attribute in the first and in the last quarter of the film:", ""]
        lines += _quarter_table(experiment, results)
    if later:
        lines += ["", "Shots after the first, by whether training may have shown their attribute pairs:", ""]
        lines += _pair_table(results)
        motions = Counter(motion for asked in later for motion in asked["motions"]).most_common()
        lines += ["", f"Motions asked for there: {', '.join(f'{name} {number}' for name, number in motions)}."]
        lines += ["", "By position of the shot, mean and interval over the films whose shot there states it:"]
        lines += _shot_tables(results)
    return "\n".join(lines) + "\n"


def _figure_table(experiment: Experiment, results: Results) -> list[str]:
    figures = _shown(experiment)
    header = ["", *map(_heading, figures), "s per s of film", "of it AR", "DiT calls"]
    lines = [_row(header), _row(["---"] * len(header))]
    for condition, records in results.items():
        shares = figure_shares(records, figures)
        spent = cost(records)
        ends = [f"{spent['seconds_per_second']:.2f}", f"{spent['ar_share']:.0%}", str(spent["dit_calls"])]
        lines.append(_row([condition, *(_cell(shares[name]) for name in figures), *ends]))
    return lines


def _shown(experiment: Experiment) -> list[str]:
    return [name for name in experiment.figures if name not in QUARTER_FIGURES]


def _heading(name: str) -> str:
    return name.removeprefix("prompt_").replace("_", " ")


def _compared(experiment: Experiment, results: Results) -> dict[tuple[str, str], dict[str, Share]]:
    """Differences of the pairs of conditions that are to be compared, and are there."""
    return {
        (name, other): figure_differences(results[name], results[other], _shown(experiment))
        for name, other in experiment.compared
        if name in results and other in results
    }


def _difference_table(compared: Mapping[tuple[str, str], Mapping[str, Share]]) -> list[str]:
    """A row a pair of conditions, a column a figure."""
    figures = list(next(iter(compared.values())))
    lines = [_row(["", *map(_heading, figures)]), _row(["---"] * (1 + len(figures)))]
    for (name, other), shares in compared.items():
        lines.append(_row([f"{name}, less {other}", *(_cell(shares[figure]) for figure in figures)]))
    return lines


def _quarter_table(experiment: Experiment, results: Results) -> list[str]:
    """A row an attribute and condition."""
    ends = ("first", "last", "change")
    figures = [name for name in experiment.figures if name in QUARTER_FIGURES]
    attributes = dict.fromkeys(name.removeprefix("prompt_").rsplit("_", 1)[0] for name in figures)
    shares = {condition: figure_shares(records, figures) for condition, records in results.items()}
    lines = [_row(["", "", *ends]), _row(["---"] * (2 + len(ends)))]
    for attribute in attributes:
        for condition, found in shares.items():
            cells = [_cell(found[f"prompt_{attribute}_{end}"]) for end in ends]
            lines.append(_row([attribute, condition, *cells]))
    return lines


def _pair_table(results: Results) -> list[str]:
    """A row a condition and kind of pair, a column an attribute."""
    names = ("accuracy", *PROMPT_ATTRIBUTES)
    lines = [_row(["", "pairs", *names]), _row(["---"] * (2 + len(names)))]
    for condition, records in results.items():
        for kind, held_out in PAIRS.items():
            shares = accuracy_by_pair(records, held_out=held_out)
            lines.append(_row([condition, kind, *(_cell(shares[name]) for name in names)]))
    return lines


def _shot_tables(results: Results) -> list[str]:
    """A table an attribute: a row a condition, a column a position."""
    tables = {condition: figures_by_shot(records) for condition, records in results.items()}
    length = min(len(table["accuracy"]) for table in tables.values())
    header = ["", *(str(position + 1) for position in range(length))]
    lines: list[str] = []
    for name in ("accuracy", *PROMPT_ATTRIBUTES, *JOIN_FIGURES):
        rows = [[condition, *map(_cell, table[name][:length])] for condition, table in tables.items()]
        if any(cell for row in rows for cell in row[1:]):
            lines += ["", f"**{_heading(name)}**", "", _row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(share: Share) -> str:
    if not share.count:
        return ""
    return f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}]"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _rounded(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return round(values, 4) if isinstance(values, float) else values


def _plain(share: Share) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(share).items()}
