"""How good a student the align stage gives for a number of tokens: the plain recipe next to the shipped one.

Does: run both through `mar refine`'s machinery into one run folder (stop and repeat at will, it goes on), and compare
them on one held-out text. Does not: time anything; kernels are the same in both.

    python benchmarks/align_quality.py --text FOLDER --held-out FILE.txt --output RUN [--tokens 600000] [--json]

plain: decay biases spread over the heads, x scaled by 1 - decay, B and C of unit length, C times 8, no calibration;
4 rows a step, lr 2e-3, cosine with 20 steps of warm-up, gradients clipped to 1 per layer.
shipped: the mixer settings and the align stage of a recipe of mar.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mar.evaluate import held_out
from mar.folder import load_student
from mar.optimizer import TrainConfig
from mar.recipe import MixerSettings, Recipe, StageConfig, read_recipe
from mar.refinement import refine
from mar.sources import DataConfig
from mar.teachers import Teacher, load_teacher
from timing import arguments, environment, finish, settings, show

FIGURES = ("kl", "agreement", "ppl")


def plain_recipe(teacher: str, data: DataConfig, tokens: int) -> Recipe:
    """The recipe that the prototypes used, before the product had a better one."""
    train = TrainConfig(tokens=tokens, batch_size=4, lr=2e-3, warmup_steps=20, clip=1.0)
    stages = {"align": StageConfig(kind="align", train=train)}
    return Recipe("plain", teacher, data, stages, mixer=MixerSettings(preset="fast", calibrate=False))


def shipped_recipe(
    name: str, teacher: str, data: DataConfig, tokens: int, overrides: list[str] | None = None
) -> Recipe:
    """The mixer and the first align stage of a recipe, on other text and for other tokens."""
    recipe = read_recipe(name, [f"data.source={data.source}", *(overrides or [])])
    stage = next(stage for stage in recipe.stages.values() if stage.kind == "align")
    stage = replace(stage, train=replace(stage.train, tokens=tokens))
    return Recipe("shipped", teacher, data, {"align": stage}, mixer=recipe.mixer)


def compare(
    recipes: list[Recipe], teacher: Teacher, held_out_file: Path, held_out_tokens: int, window: int, output: Path
) -> dict[str, Any]:
    """Train each recipe in its own folder of `output`, or go on with it, then measure all against the teacher."""
    trained = {recipe.name: refine(recipe, output / recipe.name, teacher) for recipe in recipes}
    encoded: Any = teacher.tokenizer(held_out_file.read_text(encoding="utf-8"), verbose=False)
    measured = held_out(
        {name: load_student(run.students["dense"]) for name, run in trained.items()},
        teacher.model,
        torch.tensor(encoded["input_ids"][:held_out_tokens]),
        window=window,
        precision="bf16",
        text=held_out_file.name,
        against=str(teacher.source["name"]),
    )
    return {
        recipe.name: {
            "recipe": asdict(recipe),
            "training": trained[recipe.name].metrics["align"],
            "held_out": measured[recipe.name].to_dict(),
        }
        for recipe in recipes
    }


def main(argv: list[str] | None = None) -> None:
    """Train, measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--text", required=True, help="text to train on: file or folder")
    parser.add_argument("--held-out", required=True, type=Path, help="text file to measure on")
    parser.add_argument("--output", required=True, type=Path, help="run folder")
    parser.add_argument("--tokens", type=int, default=600_000, help="training tokens of each recipe")
    parser.add_argument("--held-out-tokens", type=int, default=65_536, help="the first so many tokens are measured on")
    parser.add_argument("--length", type=int, default=512, help="tokens a row, and a window of the held-out text")
    parser.add_argument("--teacher", default="smollm2-135m", help="as in `mar refine`")
    parser.add_argument("--recipe", default="smollm2-135m", help="whose mixer and align stage are the shipped ones")
    parser.add_argument("--set", nargs="*", help="changes to it, as stages.align.train.batch_size=1")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    teacher = load_teacher(options.teacher)
    data = DataConfig(source=options.text, length=options.length)
    recipes = [
        plain_recipe(options.teacher, data, options.tokens),
        shipped_recipe(options.recipe, options.teacher, data, options.tokens, options.set),
    ]
    runs = compare(recipes, teacher, options.held_out, options.held_out_tokens, options.length, options.output)
    values = {name: {key: run["held_out"][key]["value"] for key in FIGURES} for name, run in runs.items()}
    show(
        f"align, {options.tokens} tokens, measured on {options.held_out.name}",
        ["", *FIGURES, "training MSE"],
        [
            [name, *figures.values(), runs[name]["training"]["relative_mse_to_llama"]]
            for name, figures in values.items()
        ],
    )
    found = {
        "benchmark": "align_quality",
        "environment": environment(),
        "settings": settings(options),
        "kl_of_shipped_over_plain": values["shipped"]["kl"] / values["plain"]["kl"],
        "runs": runs,
    }
    finish(found, options)


if __name__ == "__main__":
    main()
