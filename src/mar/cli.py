"""The command line: a table of verbs over plain functions.

Does: make a parser from each verb's signature and docstring, call, print; one JSON object on stdout with --json,
everything else on stderr; errors in one line with exit code 2, Ctrl-C with 130. Does not: compute anything itself.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mar import verbs

VERBS: dict[str, Callable[..., verbs.Result]] = {
    "convert": verbs.convert,
    "insert": verbs.insert,
    "retune": verbs.retune,
    "refine": verbs.refine,
    "train": verbs.train,
    "pack": verbs.pack,
    "eval": verbs.evaluate,
    "energy": verbs.energy,
    "spikes": verbs.spikes,
    "generate": verbs.generate,
    "chat": verbs.chat,
    "quickstart": verbs.quickstart,
    "report": verbs.report,
    "info": verbs.info,
}

OVERRIDE = re.compile(r"--(name|teacher|[a-z_]+\.[\w.-]+)(=.*)?", re.DOTALL)
"""A setting of a recipe: its name, its teacher, or anything with a dot in it."""

SPEAKING = ("chat", "quickstart", "refine", "report")
"""Verbs that say what there is to say while they run."""


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`.\n")


def build_parser() -> argparse.ArgumentParser:
    """One subcommand a verb: positional-only parameters are given by position, the others as options."""
    parser = _Parser(prog="mar", description="Refine a LLaMA checkpoint into a spiking state-space model.")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for verb, function in VERBS.items():
        summary, texts = _documentation(function)
        command = commands.add_parser(verb, help=summary.split("\n")[0], description=summary, allow_abbrev=False)
        hints = get_type_hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in texts:
                _add_argument(command, parameter, hints[name], texts[name])
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What a docstring says about the function and about each of its arguments."""
    summary, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE)
    return " ".join(summary.split()), {name: " ".join(text.split()) for name, text in entries}


def _add_argument(command: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    """Offer one parameter; its hint is a type that takes a string, bool, a Literal, a list, or one of these or None."""
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    (kind,) = [part for part in get_args(hint) if part is not NoneType] if NoneType in get_args(hint) else [hint]
    if get_origin(kind) is list:
        (kind,), settings["nargs"] = get_args(kind), "+"
    if get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif kind is bool:
        settings["action"] = "store_true"
    else:
        settings["type"] = _path if kind is Path else kind
    required = parameter.default is parameter.empty
    if not (required or parameter.default is None or parameter.default is False):
        settings["default"] = parameter.default
        settings["help"] += f" (default: {parameter.default})"
    if parameter.kind is not parameter.POSITIONAL_ONLY:
        command.add_argument(f"--{parameter.name.replace('_', '-')}", required=required, **settings)
    else:
        command.add_argument(parameter.name, **settings if required else {**settings, "nargs": "?"})


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Exit codes: 0 done, 2 bad input (one line says what to do), 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        sys.exit(_run(arguments))
    except KeyboardInterrupt as stop:
        _say(str(stop) or "Interrupted; run the same command again to go on.")
        sys.exit(130)
    except (ValueError, OSError) as error:
        _say(f"mar: {' '.join(str(error).split())}")
        sys.exit(2)
    finally:
        _leave_group()


def _run(arguments: list[str]) -> int:
    plain, overrides = _split_overrides(arguments) if arguments[:1] == ["refine"] else (arguments, [])
    parser = build_parser()
    end = plain.index("--") if "--" in plain else len(plain)
    found, unknown = parser.parse_known_args([_dashed(argument) for argument in plain[:end]] + plain[end:])
    options = vars(found)
    verb, as_json = options.pop("verb"), options.pop("json")
    if unknown:
        parser.exit(2, f"mar {verb}: unrecognized arguments: {' '.join(unknown)}; see `mar {verb} --help`.\n")
    if overrides:
        options["overrides"] = overrides
    # Libraries print where they like; stdout is for the result alone.
    with redirect_stdout(sys.stderr):
        result = _call(VERBS[verb], options)
    if os.environ.get("RANK", "0") != "0":
        return 0  # of the processes that torchrun started one speaks for all
    if as_json:
        print(json.dumps(result, default=str))
    elif options.get("print_config"):
        print(_as_yaml(result), end="")
    elif verb == "generate":
        print(result["text"])
    elif verb not in SPEAKING:
        _show(verb, result)
    return 0


def _leave_group() -> None:
    """End the process group that a verb may have joined; looked up, for verbs without torch must not import it."""
    distributed = sys.modules.get("torch.distributed")
    if getattr(distributed, "is_initialized", bool)():
        distributed.destroy_process_group()  # type: ignore[union-attr]


def _call(function: Callable[..., verbs.Result], options: dict[str, Any]) -> verbs.Result:
    parameters = inspect.signature(function).parameters.values()
    by_position = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
    named = {name: value for name, value in options.items() if name not in by_position}
    return function(*(options[name] for name in by_position), **named)


def _path(text: str) -> Path:
    # pathlib takes "" for the working directory, which a shell variable that is not set would then overwrite.
    if not text:
        raise argparse.ArgumentTypeError("an empty path; name a file or folder")
    return Path(text)


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate a recipe's settings, `--a.b=c` and `--a.b c`, from the verb's own arguments."""
    plain, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if OVERRIDE.fullmatch(argument):
            overrides.append(argument[2:] if "=" in argument else f"{argument[2:]}={next(rest, '')}")
        else:
            plain.append(argument)
    return plain, overrides


def _dashed(argument: str) -> str:
    """An option's name may be written with underscores too, as it is in Python."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _show(verb: str, result: verbs.Result) -> None:
    """Print a result for people: tables and single values; what is nested deeper is for --json."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width, and a table folded to 80 columns can't be read.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    for rows in TABLES.get(verb, lambda _: [])(result):
        table = Table()
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(
                *(_figure(value) if isinstance(value, float) else escape(str(value)) for value in row.values())
            )
        console.print(table)
    single = {name: value for name, value in result.items() if value not in ({}, []) and _is_flat(value)}
    _say(_as_yaml(single).rstrip())


def _is_flat(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return not any(isinstance(part, dict | list) for part in parts)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _energy_rows(result: verbs.Result) -> list[list[dict[str, Any]]]:
    names = {"decoder_uj": "decoder", "with_head_uj": "with head"}
    return [
        [
            {"model": row["model"], "prices": row["table"]}
            | {f"{names[key]}, µJ": row["compute"][key] for key in names}
            | {f"{names[key]} and memory, µJ": row["compute_and_memory"][key] for key in names}
            for row in result["models"]
        ]
    ]


def _spike_rows(result: verbs.Result) -> list[list[dict[str, Any]]]:
    sites = {**result["by_site"], "all, weighted by MACs": result["totals"]}
    weight = {name: "mac" if name.startswith("all") else "element" for name in sites}
    return [
        [
            {
                "site": name,
                "spikes per input": figures[f"spikes_per_{weight[name]}"],
                "non-zero": figures[f"nonzero_per_{weight[name]}"],
                "silent channels": figures["silent_share"],
            }
            for name, figures in sites.items()
        ]
    ]


RATES = {"spikes_per_mac": "spikes per input (MACs)", "nonzero_per_mac": "non-zero (MACs)"}


def _evaluation_rows(result: verbs.Result) -> list[list[dict[str, Any]]]:
    def interval(estimate: dict[str, Any]) -> str:
        value, low, high = (estimate[key] for key in ("value", "low", "high"))
        return "–" if value is None else f"{value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")

    names = {"ppl": "perplexity", "teacher_ppl": "teacher's", "agreement": "top-1 agreement"}
    text = [
        {"model": name}
        | {label: interval(row[key]) for key, label in {**names, "kl": f"KL to {row['against']}"}.items()}
        for name, row in result.get("held_out", {}).items()
    ]
    tasks = [
        {"model": name, "task": row["task"], "metric": row["metric"], "items": row["items"]}
        | {key: interval(row[key]) for key in ("student", "teacher", "difference", "agreement", "kept")}
        | {"chance": row["chance"], "majority": row["majority"]}
        for name, comparison in result.get("tasks", {}).items()
        for row in comparison["tasks"]
    ]
    rates = {name: row["totals"] for name, row in result.get("spikes", {}).items()}
    prices = [
        {"model": name, "modelled decoder, µJ per token": row["decoder_uj"], "with head, µJ": row["with_head_uj"]}
        | {label: rates.get(name, {}).get(key, "–") for key, label in RATES.items()}
        for name, row in result.get("energy", {}).items()
    ]
    return [rows for rows in (text, tasks, prices) if rows]


TABLES: dict[str, Callable[[verbs.Result], list[list[dict[str, Any]]]]] = {
    "energy": _energy_rows,
    "eval": _evaluation_rows,
    "spikes": _spike_rows,
}
"""What of a verb's result is shown in tables, each a list of rows of equal columns."""


def _as_yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
