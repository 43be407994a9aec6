"""The report's table, figures and page, on figures made up here."""

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from mar.config import SITES
from mar.report import (
    DARK,
    LIGHT,
    ModelRow,
    QuickReport,
    energy_figure,
    html_report,
    loss_figure,
    rates_figure,
    save_svg,
    svg,
    terminal_table,
)

STUDENT = ModelRow("spiking", 158_304_320, 61.72, 1.6149, "smollm2-135m", 0.4012, 1.1638, 0.4634, 141.94, 1272.06)
NUMBERS = ("158.3 M", "61.7", "1.61", "40.1 %", "1.16", "46.3 %", "142", "1,272")
"""The student's row as it is to be read."""


@pytest.fixture
def report() -> QuickReport:
    dense = ModelRow("dense", 158_000_000, 33.1, 0.92, "smollm2-135m", 0.512, None, None, 534.0, 664.0)
    return QuickReport(
        title="Quick & small",
        recipe_yaml="name: quickstart\nseed: 7\nnote: <none>\n",
        environment={"cpus": 2, "torch": "2.13.0", "minutes": 9.4},
        rows=[
            ModelRow("teacher", 134_515_008, 18.3, None, None, None, None, None, 492.0, 622.0),
            dense,
            replace(STUDENT),
        ],
        stage_logs={
            "align": [{"step": i, "tokens": 100 * i, "loss": 1 / i, "lr": 1e-3} for i in range(1, 40)],
            "spike": [{"step": 1, "tokens": 100, "loss": 2.0}],
            "not started": [],
        },
        rates=[[0.5 + layer, 0.25, None, 2.0] for layer in range(3)],
        energy_curves={"teacher": ([64, 256, 1024], [490.0, 500.0, 640.0]), "spiking": ([64, 256, 1024], [142.0] * 3)},
        samples={"teacher": "Sleep <b>well</b> & often.", "spiking": "<script>alert(1)</script> the the"},
        notes=["Energy is modelled.", "5 < 6"],
    )


class Page(HTMLParser):
    """Tags, ids, references and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "data", "srcset", "action", "poster", "xlink:href"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(report: QuickReport, folder: Path) -> str:
    html_report(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_report_goes_through_json(report: QuickReport) -> None:
    again = QuickReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.to_dict() == report.to_dict()
    assert again.rows[2] == STUDENT


def test_other_versions_keys_are_refused(report: QuickReport) -> None:
    for change in (
        lambda values: values.pop("samples"),
        lambda values: values.update(colour="red"),
        lambda values: values["rows"][0].pop("kl"),
        lambda values: values["rows"][1].update(speed=3),
    ):
        values = copy.deepcopy(report.to_dict())
        change(values)
        with pytest.raises(ValueError, match=r"samples|colour|kl|speed"):
            QuickReport.from_dict(values)


def printed(report: QuickReport, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(terminal_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str) -> dict[str, list[str]]:
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {name: row for name, *row in rows}


def test_the_table_shows_each_figure_and_says_against_whom(report: QuickReport) -> None:
    text = printed(report)
    assert cells(text)["spiking"] == list(NUMBERS)
    assert next(line for line in text.splitlines() if "teacher" in line).count("–") == 4
    for words in ("KL to smollm2-135m", "MODELLED", "Measured on held-out text", "µJ per token", "with the LM head"):
        assert words in text


def test_the_table_keeps_its_figures_at_eighty_columns(report: QuickReport) -> None:
    assert cells(printed(report, 80))["spiking"] == list(NUMBERS)


def test_kls_to_different_models_are_told_apart(report: QuickReport) -> None:
    report.rows[2].against = "dense"
    text = printed(report)
    assert "KL to smollm2-135m" not in text
    assert cells(text)["dense"][2:4] == ["0.920", "smollm2-135m"]
    assert cells(text)["spiking"][2:4] == ["1.61", "dense"]


def test_the_page_stands_alone(report: QuickReport, tmp_path: Path) -> None:
    text = page(report, tmp_path)
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert "http" not in text
    assert "src=" not in text
    assert "@import" not in text
    assert found.tags.count("svg") == 3
    assert len(found.ids) == len(set(found.ids)), "figures would take each other's parts"
    assert found.references
    assert {reference.strip("#'\"") for reference in found.references} <= set(found.ids)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_page_holds_everything(report: QuickReport, tmp_path: Path) -> None:
    text = Page(page(report, tmp_path)).text
    for part in (*NUMBERS, "134.5 M", "18.3", "0.920", "51.2 %", "Quick & small", "KL to smollm2-135m"):
        assert part in text
    for part in (*report.samples.values(), *report.notes, report.recipe_yaml, *report.environment, "2.13.0", "9.4"):
        assert str(part) in text
    for part in ("align", "training tokens", *SITES, "decoder layer", "context, tokens", "µJ per token, MODELLED"):
        assert part in text, "the text of figures stays text"


def test_samples_are_escaped(report: QuickReport, tmp_path: Path) -> None:
    text = page(report, tmp_path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>well" not in text
    report.title, report.environment, report.rows[0].name = "<i>", {"<i>": "<i>"}, "<i>"
    report.notes, report.recipe_yaml, report.samples = ["<i>"], "<i>", {"<i>": "<i>"}
    report.rows[1].against = report.rows[2].against = "<i>"
    assert "i" not in Page(page(report, tmp_path)).tags


def test_a_report_without_students_has_no_empty_figures(report: QuickReport, tmp_path: Path) -> None:
    empty = QuickReport("only a table", "", {}, report.rows[:1], stage_logs={"align": []})
    assert Page(page(empty, tmp_path)).tags.count("svg") == 0


def figures(report: QuickReport) -> dict[str, Figure]:
    return {
        "loss": loss_figure({name: log for name, log in report.stage_logs.items() if log}),
        "rates": rates_figure(report.rates),
        "energy": energy_figure(report.energy_curves),
    }


def test_equal_data_give_equal_bytes(report: QuickReport, tmp_path: Path) -> None:
    first = {name: svg(figure, name) for name, figure in figures(report).items()}
    assert {name: svg(figure, name) for name, figure in figures(copy.deepcopy(report)).items()} == first
    assert page(report, tmp_path) == page(report, tmp_path)


def test_drawing_leaves_matplotlibs_settings_alone(report: QuickReport, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    page(report, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_figures_follow_the_theme(report: QuickReport, tmp_path: Path) -> None:
    for name, figure in figures(report).items():
        text = svg(figure, name)
        colors = set(re.findall(r"var\(--(\w+), #", text))
        assert {"ink", "a"} & colors
        assert colors <= set(LIGHT) == set(DARK)
        # Nothing is left in matplotlib's own black or white, which would vanish on one of the two grounds.
        assert not re.search(r"(fill|stroke): #(000000|ffffff)\b", text)
        save_svg(figure, tmp_path / f"{name}.svg")
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in (tmp_path / f"{name}.svg").read_text()


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("theme", "ground"), [(LIGHT, "#f4f6f8"), (DARK, "#1d232a")])
def test_colours_can_be_read(theme: dict[str, str], ground: str) -> None:
    """WCAG's contrast on the panel: 7 for text, 3 for lines."""
    for role in ("ink", "a", "b", "c", "d"):
        light, dark = sorted((luminance(theme[role]), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= (7 if role == "ink" else 3)


def test_loss_curves_are_the_logged_ones(report: QuickReport) -> None:
    align, spike = figures(report)["loss"].axes
    assert (align.get_title(), spike.get_title()) == ("align", "spike")
    raw, smooth = align.lines
    assert raw.get_xdata().tolist() == [100.0 * i for i in range(1, 40)]
    assert raw.get_ydata()[3] == 0.25
    # Windows of 39 // 15 = 2.
    assert smooth.get_ydata()[0] == pytest.approx((1 + 1 / 2) / 2)
    assert smooth.get_xdata()[0] == 200
    assert spike.lines[-1].get_marker() == "o", "a single point needs a marker to be seen"


def test_rates_are_drawn_by_site_and_layer(report: QuickReport) -> None:
    heat, lines, _ = figures(report)["rates"].axes
    values = heat.collections[0].get_array().reshape(len(SITES), 3)  # type: ignore[union-attr]
    assert values[0].tolist() == [0.5, 1.5, 2.5]
    assert np.ma.getmaskarray(values)[2].all() or np.isnan(np.asarray(values, dtype=float)[2]).all()
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()) for line in lines.lines}
    assert list(drawn) == list(SITES)
    assert drawn["in_proj"].tolist() == [0.5, 1.5, 2.5]
    assert np.isnan(drawn["gate_up"]).all()
    assert [text.get_text() for text in heat.get_yticklabels()] == list(SITES)


def test_energy_curves_are_drawn_as_given(report: QuickReport) -> None:
    (axes,) = figures(report)["energy"].axes
    drawn = {str(line.get_label()): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    assert drawn == {name: (list(x), list(y)) for name, (x, y) in report.energy_curves.items()}
    assert "MODELLED" in axes.get_ylabel()
    assert axes.get_xscale() == axes.get_yscale() == "log"
