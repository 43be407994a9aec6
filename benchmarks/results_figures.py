"""The figures of docs/results.md, from what training and `mar eval --json` wrote.

    python benchmarks/results_figures.py --logs align=RUN/1-align/training/log.jsonl ... --evaluation eval.json
    python benchmarks/results_figures.py

The first form averages each log over 60 equal stretches and keeps these, the energy curves and the spike rates in
docs/assets/results.json; both forms then draw what that file holds as docs/assets/results-*.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mar.report import energy_figure, loss_figure, rates_figure, save_svg

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
KEPT = ASSETS / "results.json"
STRETCHES = 60


def curve(log: Path) -> list[dict[str, float]]:
    """Means of the first metric over equal stretches of a training log, named `loss` as the figure wants it."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    metric = next(name for name in records[0] if name not in ("step", "tokens"))
    size = max(1, len(records) // STRETCHES)
    parts = [records[start : start + size] for start in range(0, len(records) - size + 1, size)]
    return [
        {"tokens": part[-1]["tokens"], "loss": round(sum(record[metric] for record in part) / size, 5)}
        for part in parts
    ]


def draw(kept: dict[str, Any]) -> list[Path]:
    """Write every figure that `kept` has data for; returns their files."""
    figures = {"loss": loss_figure(kept["logs"])} if kept.get("logs") else {}
    if curves := kept.get("energy_curves"):
        figures["energy"] = energy_figure({name: (row["contexts"], row["decoder_uj"]) for name, row in curves.items()})
    for name, grids in kept.get("rate_grids", {}).items():
        figures[f"rates-{name}"] = rates_figure(grids["spikes"])
    for name, figure in figures.items():
        save_svg(figure, ASSETS / f"results-{name}.svg")
    return [ASSETS / f"results-{name}.svg" for name in figures]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", nargs="+", default=[], metavar="NAME=LOG", help="log.jsonl of a stage")
    parser.add_argument("--evaluation", type=Path, help="what `mar eval --json` printed")
    parser.add_argument("--names", nargs="+", default=[], metavar="MODEL=NAME", help="what its models are called here")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    if options.logs:
        kept["logs"] = {name: curve(Path(log)) for name, _, log in (pair.partition("=") for pair in options.logs)}
    if options.evaluation:
        names = dict(pair.split("=", 1) for pair in options.names)
        found = json.loads(options.evaluation.read_text(encoding="utf-8"))
        for part in ("energy_curves", "rate_grids"):
            kept[part] = {names.get(model, model): row for model, row in found[part].items()}
    if options.logs or options.evaluation:
        KEPT.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    print(*draw(kept), sep="\n")
