"""What a run found, for people: a table for the terminal, figures as SVG, and one self-contained HTML page.

Does: hold the figures of a report, format, draw and write them. Does not: measure or model anything (mar.results).
The figures follow a page's light or dark theme; they can also be saved one by one for other documents.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mar.checkpoint import replace_atomically
from mar.config import SITES


@dataclass
class ModelRow:
    """One model's figures; None where a figure makes no sense for it.

    perplexity, kl (nats per token, KL(`against` ‖ model)) and agreement (share of top-1 predictions): held-out text.
    spikes_per_input: r·T, the mean spike count of a linear's inputs; nonzero: share of inputs that are not zero; both
    MAC-weighted. energy_*_uj: modelled µJ per decoded token, of the decoder and with the LM head.
    """

    name: str
    parameters: int
    perplexity: float
    kl: float | None
    against: str | None
    agreement: float | None
    spikes_per_input: float | None
    nonzero: float | None
    energy_decoder_uj: float
    energy_total_uj: float


@dataclass
class QuickReport:
    """All that a report shows; plain values, so that it goes through JSON unchanged.

    stage_logs: stage to the records of its log.jsonl (`tokens`, `loss`). rates: spikes per input, layers × SITES, None
    where a site has no neuron; empty without a spiking model. energy_curves: model to (contexts, decoder µJ per token).
    """

    title: str
    recipe_yaml: str
    environment: dict[str, Any]
    rows: list[ModelRow]
    stage_logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rates: list[list[float | None]] = field(default_factory=list)
    energy_curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuickReport:
        """The report that `to_dict` gave, from JSON too. Raises ValueError where keys are missing or unknown."""
        _check_keys("the report", values, cls)
        for row in values["rows"]:
            _check_keys("a row of the report", row, ModelRow)
        curves = {name: (list(curve[0]), list(curve[1])) for name, curve in values["energy_curves"].items()}
        return cls(**{**values, "rows": [ModelRow(**row) for row in values["rows"]], "energy_curves": curves})


def _check_keys(what: str, values: dict[str, Any], kind: type) -> None:
    wanted = {item.name for item in fields(kind)}
    if wrong := wanted ^ set(values):
        raise ValueError(
            f"The keys {sorted(wrong)} of {what} are missing or unknown; it was written by another version of mar, so "
            "run the measurement again."
        )


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _digits(number: float) -> str:
    """Three significant digits, no exponent for what a reader would write out."""
    return f"{number:,.0f}" if 100 <= abs(number) < 1e6 else f"{number:#.3g}".rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class _Column:
    group: str
    title: str
    short: str
    value: Callable[[ModelRow], Any]
    format: Callable[[Any], str]

    def cell(self, row: ModelRow) -> str:
        value = self.value(row)
        return "–" if value is None else self.format(value)


def _columns(rows: Sequence[ModelRow]) -> list[_Column]:
    targets = {row.against for row in rows} - {None}
    measured, modelled = "measured on held-out text", "modelled, µJ per token"
    columns = [
        _Column("", "params", "params", lambda row: row.parameters, _count),
        _Column(measured, "perplexity", "ppl", lambda row: row.perplexity, _digits),
        _Column(measured, "KL (nats)", "KL", lambda row: row.kl, _digits),
        _Column(measured, "top-1 agreement", "top-1", lambda row: row.agreement, _percent),
        _Column(measured, "spikes per input, r·T", "r·T", lambda row: row.spikes_per_input, _digits),
        _Column(measured, "non-zero inputs", "≠ 0", lambda row: row.nonzero, _percent),
        _Column(modelled, "decoder", "µJ", lambda row: row.energy_decoder_uj, _digits),
        _Column(modelled, "with LM head", "µJ with head", lambda row: row.energy_total_uj, _digits),
    ]
    if len(targets) == 1:
        columns[2] = _Column(measured, f"KL to {targets.pop()} (nats)", "KL", lambda row: row.kl, _digits)
    elif targets:
        columns.insert(3, _Column(measured, "KL to", "KL to", lambda row: row.against, str))
    return columns


def terminal_table(report: QuickReport) -> Table:
    """One row a model, in short words. The caption says what they are, what is measured and what is modelled."""
    columns = _columns(report.rows)
    kl = next(column.title for column in columns if column.short == "KL")
    caption = (
        f"Measured on held-out text: perplexity, {kl}, top-1 agreement, spikes per input (r·T) and inputs ≠ 0, "
        "MAC-weighted. MODELLED: µJ per token, of the decoder and with the LM head."
    )
    table = Table(title=report.title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in columns:
        # A narrow terminal breaks titles between words, and never figures.
        words = [*column.short.split(), *(column.cell(row) for row in report.rows)]
        table.add_column(column.short, justify="right", min_width=max(map(len, words)), overflow="fold")
    for row in report.rows:
        table.add_row(row.name, *(column.cell(row) for column in columns))
    return table


LIGHT = {"ink": "#1f2933", "faint": "#c9d1d9", "a": "#0b6db8", "b": "#c8500a", "c": "#14866a", "d": "#8f4fa3"}
DARK = {"ink": "#e3e8ee", "faint": "#46505c", "a": "#5fb1f2", "b": "#ff9a57", "c": "#4fc9a4", "d": "#d29be3"}
"""Colours by role. Blue, orange, green and purple of different brightness, and lines differ in their markers too."""

SERIES = ("a", "b", "c", "d")
MARKERS = ("o", "s", "^", "D")
MODELS = ("ink", "a", "b", "c", "d")
"""Teacher, dense student, spiking student, others."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mar",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.edgecolor": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT["faint"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["ink"],
    "ytick.color": LIGHT["ink"],
}


def loss_figure(stage_logs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training loss against tokens, a panel a stage, because the stages' losses are not on one scale.

    stage_logs: at least one stage, each with at least one record of `tokens` and `loss`.
    """
    columns = min(3, len(stage_logs))
    rows = -(-len(stage_logs) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 0.4 + 2.1 * rows), layout="constrained")
        for number, (name, records) in enumerate(stage_logs.items()):
            axes = figure.add_subplot(rows, columns, number + 1)
            tokens = np.array([record["tokens"] for record in records], dtype=float)
            losses = np.array([record["loss"] for record in records], dtype=float)
            window = max(1, len(losses) // 15)
            smooth = np.convolve(losses, np.ones(window) / window, "valid")
            axes.plot(tokens, losses, color=LIGHT["a"], alpha=0.3 if window > 1 else 1.0, linewidth=1.0)
            axes.plot(tokens[window - 1 :], smooth, color=LIGHT["a"], marker="o" if len(records) < 15 else None)
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(round(value))))
        figure.supxlabel("training tokens", fontsize=9)
        figure.supylabel("training loss", fontsize=9)
    return figure


def rates_figure(rates: list[list[float | None]]) -> Figure:
    """Spikes per input (r·T) by layer and site, layers × SITES: as a heat map and as lines."""
    grid = np.array([[np.nan if value is None else value for value in layer] for layer in rates], dtype=float)
    layers = np.arange(len(grid))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 1.7])
        edges = np.arange(len(grid) + 1) - 0.5
        limit = max(float(np.nanmax(grid)), 1e-9)
        mesh = top.pcolormesh(
            edges,
            np.arange(len(SITES) + 1),
            grid.T,
            cmap="viridis",
            vmin=0,
            vmax=limit,
            edgecolor="face",
            linewidth=0.3,
        )
        top.set_yticks(np.arange(len(SITES)) + 0.5, SITES)
        top.invert_yaxis()
        top.grid(False)
        top.tick_params(length=0)
        top.spines[:].set_visible(False)
        scale = figure.colorbar(mesh, ax=top, pad=0.01, values=np.linspace(0, limit, 24))
        scale.set_label("spikes per input")
        scale.outline.set_visible(False)  # type: ignore[operator]
        for site, values, color, marker in zip(SITES, grid.T, SERIES, MARKERS, strict=True):
            bottom.plot(layers, values, color=LIGHT[color], marker=marker, label=site)
        bottom.set_ylim(bottom=0)
        bottom.set_xlim(-0.5, len(grid) - 0.5)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        bottom.set_xlabel("decoder layer")
        bottom.set_ylabel("spikes per input, r·T")
        _legend_above(bottom)
    return figure


def energy_figure(energy_curves: dict[str, tuple[list[int], list[float]]]) -> Figure:
    """Modelled energy per decoded token against the length of its context, decoder only; both axes logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, (contexts, energies)) in enumerate(energy_curves.items()):
            color, marker = MODELS[number % len(MODELS)], MARKERS[number % len(MARKERS)]
            axes.plot(contexts, energies, color=LIGHT[color], marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "1235" else ""))
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("µJ per token, MODELLED")
        _legend_above(axes)
    return figure


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, handlelength=2.2)


def svg(figure: Figure, salt: str = "mar") -> str:
    """The figure as an SVG element that follows the page's theme, equal for equal data.

    salt: keeps the names inside apart from those of other figures on the same page.
    """
    with io.StringIO() as buffer, matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # In a page these are known, and names of groups would be there more than once.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    for role, color in LIGHT.items():
        text = text.replace(color, f"var(--{role}, {color})")
    return text.strip()


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as a file of its own, which follows the reader's light or dark setting."""
    head = '<svg xmlns="http://www.w3.org/2000/svg"'
    style = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {_variables(DARK)} }} }}</style>"
    text = svg(figure).replace("<svg", head, 1)
    replace_atomically(path, (re.sub(r"(<svg[^>]*>)", lambda found: found[0] + style, text, count=1) + "\n").encode())


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{role}: {color};" for role, color in colors.items())


def html_report(report: QuickReport, path: Path) -> None:
    """Write the report as one HTML file that needs no other file, no network and no script."""
    spans: list[tuple[str, int]] = []
    columns = _columns(report.rows)
    for column in columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    groups = "".join(f'<th colspan="{width}" class="group">{escape(group)}</th>' for group, width in spans)
    titles = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(f"<td>{escape(column.cell(row))}</td>" for column in columns)
        + "</tr>"
        for row in report.rows
    )
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        '<div class="wide"><table><thead><tr><td></td>' + groups + "</tr>",
        f"<tr><th>model</th>{titles}</tr></thead><tbody>{body}</tbody></table></div>",
        "<p class='small'>Spikes and non-zero inputs are weighted by the multiply-accumulates that they replace. "
        "Modelled energy follows from counts of operations and published prices; nothing of it was measured.</p>",
    ]
    if report.samples:
        cards = "".join(
            f'<div class="card"><h3>{escape(name)}</h3><p>{escape(text)}</p></div>'
            for name, text in report.samples.items()
        )
        parts.append(f'<h2>A sample from each</h2><div class="cards">{cards}</div>')
    logs = {name: records for name, records in report.stage_logs.items() if records}
    if logs:
        parts.append(_section("Training", "loss", loss_figure(logs), "Each stage has a loss of its own."))
    if report.rates:
        text = "Mean number of spikes per input of a linear layer over the whole inner loop, measured on held-out text."
        parts.append(_section("Spikes by layer and site", "rates", rates_figure(report.rates), text))
    if report.energy_curves:
        text = "MODELLED energy of the decoder (no LM head) for one decoded token, by the length of its context."
        parts.append(_section("Energy and sequence length", "energy", energy_figure(report.energy_curves), text))
    if report.notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in report.notes) + "</ul>")
    facts = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in report.environment.items()
    )
    parts.append(f"<h2>What was run</h2><dl>{facts}</dl>")
    parts.append(f"<details><summary>Recipe</summary><pre>{escape(report.recipe_yaml)}</pre></details>")
    replace_atomically(path, _page(escape(report.title), "\n".join(parts)).encode())


def _section(title: str, salt: str, figure: Figure, text: str) -> str:
    return f"<h2>{title}</h2><figure>{svg(figure, salt)}<figcaption>{text}</figcaption></figure>"


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: #ffffff; --panel: #f4f6f8; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14181d; --panel: #1d232a; {_variables(DARK)} }} }}
body {{ margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 1.2rem; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .6rem; }}
h3 {{ font-size: .95rem; margin: 0 0 .3rem; color: var(--a); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .6rem; text-align: right; vertical-align: bottom; }}
th {{ font-weight: 600; }}
th.group {{ text-align: center; font-weight: 400; font-size: .8rem; }}
th.group:not(:empty) {{ border-bottom: 1px solid var(--faint); }}
tr > th:first-child {{ text-align: left; white-space: nowrap; }}
tbody tr {{ border-top: 1px solid var(--faint); }}
.small, figcaption {{ font-size: .85rem; opacity: .8; }}
figure {{ margin: 0; }}
figure svg {{ width: 100%; height: auto; }}
figure text {{ font-family: system-ui, sans-serif !important; }}
.cards {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }}
.card, pre {{ background: var(--panel); border-radius: .5rem; padding: .9rem 1rem; overflow-wrap: anywhere; }}
.card p {{ white-space: pre-wrap; margin: 0; font-size: .92rem; }}
pre {{ overflow-x: auto; font-size: .82rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; }}
dt {{ opacity: .75; }}
dd {{ margin: 0; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
