"""An evaluation as one HTML file with plots, that needs no network: the report's figures, and how they came about."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from model.evaluate import HITS_MAX, NEW_POSITIVES_MAX, TEST, Report

Array: TypeAlias = npt.NDArray[Any]

WIDTH: Final = 560
HEIGHT: Final = 300
MARGIN: Final = 44
POINTS_MAX: Final = 300  # of a curve
COLOURS: Final = (
    "#0b6e4f", "#c1121f", "#e09f3e", "#335c67", "#9a4eae", "#5f0f40", "#7f7f7f", "#118ab2", "#8a6d3b", "#2b2d42",
)  # fmt: skip
TAILS: Final = (0, 1, 5, 20, 100)  # least positives of an item before the test, of each group of the long tail
STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1180px;color:#222;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:1em 1em 0 0}"
    "figcaption{font-weight:600}svg text{font-size:11px;fill:#555}"
)


def render(report: Report, records: Mapping[str, Array]) -> str:
    """records: (n,) TEST of each recommender, the model first, of the same tests in order of time."""
    assert all(rows.dtype == TEST for rows in records.values())
    gains = {name: _gains(rows["rank"]) for name, rows in records.items()}
    first = next(iter(records.values()))
    slices = (
        ("NDCG@10 so far, all tests", np.ones(len(first), np.bool_)),
        (f"New users: their first {NEW_POSITIVES_MAX} positives", _below(first["user_positives"])),
        (f"New items: under {NEW_POSITIVES_MAX} positives", _below(first["item_positives"])),
    )
    figures = [
        _figure(title, "tests", "NDCG@10", {name: _running(gain[chosen]) for name, gain in gains.items()})
        for title, chosen in slices
    ]
    figures.append(_tail(gains, first["item_positives"]))
    figures.append(_reliability(report["calibration"]["reliability"]))
    title = html.escape(f"Headwater: {report['stream']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{report['events']} events, {report['tests']} tests: each event is first a test of the "
        f"model as it is then, and only after that learnt.</p>{_table(report)}{''.join(figures)}"
        f"<h2>The report</h2><pre>{html.escape(json.dumps(report, indent=2))}</pre></html>\n"
    )


def _gains(rank: Array) -> Array:
    return np.where(rank <= HITS_MAX, 1 / np.log2(1 + rank), 0.0)


def _below(positives: Array) -> Array:
    return (positives >= 0) & (positives < NEW_POSITIVES_MAX)


def _running(values: Array) -> list[tuple[float, float]]:
    """Points (tests, mean so far)."""
    if not len(values):
        return []
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    at = np.unique(np.linspace(min(len(values), 20) - 1, len(values) - 1, POINTS_MAX).astype(int))
    return [(float(k + 1), float(means[k])) for k in at]


def _table(report: Report) -> str:
    heads = ("", "HR@10", "NDCG@10", "2nd half", "new users", "new items", "p of no difference", "better", "worse")
    lines = []
    for name, m in (("model", report["model"]), *report["baselines"].items()):
        test = report["significance"].get(name)
        cells = [
            m["hr@10"], m["ndcg@10"], m["second_half"]["ndcg@10"], m["new_user"]["ndcg@10"], m["new_item"]["ndcg@10"],
        ]  # fmt: skip
        told = ["-" if value is None else f"{value:.4f}" for value in cells]
        told += [f"{test['p']:.1e}", *(_share(test[k]) for k in ("better", "worse"))] if test else ["", "", ""]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *told)) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f"<table><tr>{head}</tr>{''.join(lines)}</table><p>Better, worse: share of windows of tests where the model is "
        "so by McNemar's test.</p>"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _tail(gains: Mapping[str, Array], positives: Array) -> str:
    """Mean NDCG@10 by how many positives the item had before."""
    group = np.searchsorted(TAILS, positives, side="right") - 1
    curves = {
        name: [(float(g), float(gain[group == g].mean())) for g in range(len(TAILS)) if (group == g).any()]
        for name, gain in gains.items()
    }
    return _figure("Long tail", f"item's positives before: from {', '.join(map(str, TAILS))}", "NDCG@10", curves)


def _reliability(groups: Sequence[Mapping[str, float]]) -> str:
    """Share of targets by the p of the ten best, beside what it should be."""
    told = [(group["p"], group["observed"]) for group in groups]
    return _figure(
        "Calibration of the ten best", "mean probability of a group", "share of targets",
        {"model": told, "exact": [(0.0, 0.0), (told[-1][0], told[-1][0])] if told else []},
    )  # fmt: skip


def _figure(title: str, x: str, y: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line plot as inline SVG, from 0."""
    points = [point for curve in curves.values() for point in curve]
    right = max((p[0] for p in points), default=1.0) or 1.0
    top = max((p[1] for p in points), default=1.0) or 1.0
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    body = [f'<path d="M{MARGIN} {MARGIN}V{MARGIN + high}H{MARGIN + wide}" fill="none" stroke="#999"/>']
    for colour, (name, curve) in zip(_colours(len(curves)), curves.items(), strict=True):
        place = " ".join(f"{MARGIN + wide * px / right:.1f},{MARGIN + high * (1 - py / top):.1f}" for px, py in curve)
        body.append(f'<polyline points="{place}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        line = 14 * len(body)
        body.append(
            f'<text x="{WIDTH - MARGIN - 96}" y="{line / 2 + 8:.0f}" style="fill:{colour}">{html.escape(name)}</text>'
        )
    labels = (
        (MARGIN, HEIGHT - 26, "0"), (WIDTH - MARGIN - 30, HEIGHT - 26, f"{right:g}"), (4, MARGIN, f"{top:.3g}"),
        (WIDTH // 2 - 60, HEIGHT - 8, x), (4, 14, y),
    )  # fmt: skip
    body += [f'<text x="{px}" y="{py}">{html.escape(label)}</text>' for px, py, label in labels]
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(body)}</svg></figure>'
    )


def _colours(n: int) -> list[str]:
    return [COLOURS[q % len(COLOURS)] for q in range(n)]
