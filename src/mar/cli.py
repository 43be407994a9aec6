"""The command line: a table of verbs over plain functions.

Does: parse, call, print; one JSON object on stdout with --json, everything else on stderr; errors in one line with exit
code 2, Ctrl-C with 130. Does not: compute anything itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from mar import verbs

OVERRIDE = re.compile(r"--[a-z_]+\.[\w.]+(=.*)?$")


VERBS: dict[str, Callable[..., verbs.Result]] = {
    "convert": verbs.convert,
    "refine": verbs.refine,
    "train": verbs.train,
    "eval": verbs.evaluate,
    "energy": verbs.energy,
    "spikes": verbs.spikes,
    "generate": verbs.generate,
    "chat": verbs.chat,
    "quickstart": verbs.quickstart,
    "report": verbs.report,
    "info": verbs.info,
}


def build_parser() -> ArgumentParser:
    """One subcommand a verb, its options from the function's signature and docstring."""
    parser = ArgumentParser(prog="mar", description="Refine a LLaMA checkpoint into a spiking state-space model.")
    commands = parser.add_subcommands(dest="verb")
    for verb, function in VERBS.items():
        command = ArgumentParser(description=(function.__doc__ or "").split("\n", 1)[0])
        command.add_function_arguments(function)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if verb == "refine":
            command.add_argument(
                "--print_config", action="store_true", help="print the recipe with overrides, and stop"
            )
        commands.add_subcommand(verb, command, help=(function.__doc__ or "").split("\n", 1)[0])
    return parser


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


def _run(arguments: list[str]) -> int:
    plain, overrides = _split_overrides(arguments) if arguments[:1] == ["refine"] else (arguments, [])
    parser = build_parser()
    values = parser.instantiate(parser.parse_args(plain))
    verb = values.verb
    options = dict(vars(values[verb]))
    as_json = options.pop("json")
    if options.pop("print_config", False):
        print(_recipe_yaml(options["recipe"], overrides))
        return 0
    if overrides:
        options["overrides"] = [*(options["overrides"] or []), *overrides]
    result = VERBS[verb](**options)
    if as_json:
        print(json.dumps(result, default=str))
    elif verb not in ("chat", "generate"):
        _say(json.dumps({key: value for key, value in result.items() if not _is_long(value)}, indent=2, default=str))
    return 0


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate `--a.b=c` and `--a.b c` from the verb's own options."""
    plain, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if OVERRIDE.match(argument):
            overrides.append(argument[2:] if "=" in argument else f"{argument[2:]}={next(rest, '')}")
        else:
            plain.append(argument)
    return plain, overrides


def _recipe_yaml(recipe: str, overrides: list[str]) -> str:
    from dataclasses import asdict

    import yaml

    from mar.recipe import read_recipe

    return yaml.safe_dump(json.loads(json.dumps(asdict(read_recipe(recipe, overrides)))), sort_keys=False)


def _is_long(value: Any) -> bool:
    return len(json.dumps(value, default=str)) > 4000


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
