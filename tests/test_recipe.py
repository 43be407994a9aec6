import math
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mar.config import NeuronConfig
from mar.recipe import (
    ABLATIONS,
    RECIPES,
    NeuronSettings,
    Recipe,
    StageConfig,
    debug_size,
    read_recipe,
    shipped_recipes,
)
from mar.sources import DataConfig

HEAD = "name: mine\nteacher: smollm2-135m\ndata: {source: a.txt}\n"
MARK = re.compile(r"\b(paper|Llamba|ours)\b")


@cache
def read_shipped(name: str) -> Recipe:
    return read_recipe(name, ["data.source=FOLDER"] if name.startswith("smollm2-135m") else [])


def read_text(tmp_path: Path, text: str, overrides: list[str] | None = None) -> Recipe:
    (tmp_path / "mine.yaml").write_text(text)
    return read_recipe(tmp_path / "mine.yaml", overrides)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse(name: str) -> None:
    recipe = read_shipped(name)
    assert recipe.name == name
    kinds = [stage.kind for stage in recipe.stages.values()]
    assert kinds[-1] == "spike"
    assert "align" in kinds or recipe.mixer.preset == "hybrid"


def test_every_recipe_file_is_offered() -> None:
    files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert files - {"ablations/base", "ablations/rows"} == {name for name in shipped_recipes() if "/" not in name}


def test_the_text_of_smollm2_is_the_users() -> None:
    with pytest.raises(ValueError, match=r"^Recipe smollm2-135m: .*required: data\.source\.$"):
        read_recipe("smollm2-135m")
    recipe = read_recipe("smollm2-135m", ["data.source=a.jsonl"])
    assert recipe.data == DataConfig(source="a.jsonl", split="train")
    assert list(recipe.stages) == ["align", "distill", "spike"]
    assert recipe.stages["align"].train.tokens == 10_000_000


def test_a_window_is_not_oriented() -> None:
    with pytest.raises(ValueError, match="orients mixers with a window of 64 tokens"):
        read_recipe("llama-3.2-1b", ["data.source=a.jsonl", "mixer.preset=hybrid"])
    with pytest.raises(ValueError, match="orients mixers with a window of 16 tokens"):
        read_recipe("llama-3.2-1b", ["data.source=a.jsonl", "mixer.window=16"])
    without = read_recipe("llama-3.2-1b", ["data.source=a.jsonl", "mixer.preset=hybrid", "mixer.window=0"])
    assert without.mixer.choices() == {"window": 0}


def test_the_llama_recipe_has_the_paper_s_values() -> None:
    recipe = read_shipped("llama-3.2-1b")
    assert recipe.teacher == "meta-llama/Llama-3.2-1B-Instruct"
    budgets = {name: stage.train.tokens for name, stage in recipe.stages.items()}
    assert budgets == {"orient": 3 * 10**8, "align": 27 * 10**8, "distill": 5 * 10**9, "spike": 7 * 10**9}
    spike = recipe.stages["spike"]
    assert (spike.alpha, spike.beta, spike.features, spike.teacher) == (0.2, 0.7, "pre", "dense")
    assert recipe.neurons.by_site() == NeuronSettings(NeuronConfig()).by_site()
    assert recipe.mixer.preset == recipe.mixer.init == "llamba"


def test_every_value_of_the_llama_recipe_says_whose_it_is() -> None:
    above = ""
    for line in (RECIPES / "llama-3.2-1b.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        if re.search(r":\s+\S", value) and not value.startswith("name:"):
            assert MARK.search(comment) or MARK.search(above), f"nobody's: {line}"
        above = f"{above} {comment}" if not value.strip() else ""


# Method, section 7: what each row of the paper's tables is; features are compared before the layers unless it says so.
ROWS: dict[str, tuple[str, float, float, str]] = {
    "table2-1-binary-kl": ("binary", 1, 0, "none"),
    "table2-2-atmn-kl": ("atmn", 1, 0, "none"),
    "table2-3-atmn-bidirectional": ("atmn", 0.2, 0.7, "none"),
    "table2-4-atmn-bidirectional-prenorm": ("atmn", 0.2, 0.7, "pre"),
    "table3-none": ("atmn", 0.2, 0.7, "none"),
    "table3-pre": ("atmn", 0.2, 0.7, "pre"),
    "table3-post": ("atmn", 0.2, 0.7, "post"),
    "table3-both": ("atmn", 0.2, 0.7, "both"),
    "table4-a0-b1": ("atmn", 0, 1, "none"),
    "table4-a1-b0": ("atmn", 1, 0, "none"),
    "table4-a07-b02": ("atmn", 0.7, 0.2, "none"),
    "table4-a02-b07": ("atmn", 0.2, 0.7, "none"),
}


def test_the_ablations_are_the_rows_of_the_paper_s_tables() -> None:
    found = {}
    for row in yaml.safe_load((ABLATIONS / "rows.yaml").read_text()):
        recipe = read_shipped(f"ablations/{row}")
        spike = recipe.stages["spike"]
        found[row] = (recipe.neurons.default.kind, spike.alpha, spike.beta, spike.features)
    assert found == ROWS


def test_ablations_differ_in_what_they_ablate_only() -> None:
    def shared(recipe: Recipe) -> dict[str, Any]:
        spike = replace(recipe.stages["spike"], alpha=None, beta=None, features=None)
        neurons = replace(recipe.neurons, default=replace(recipe.neurons.default, kind="atmn"))
        return asdict(replace(recipe, name="", neurons=neurons, stages={**recipe.stages, "spike": spike}))

    first, *others = [shared(read_shipped(f"ablations/{row}")) for row in ROWS]
    assert all(other == first for other in others)
    assert first["stages"]["spike"]["train"]["tokens"] == 400_000


def test_an_override_comes_after_a_row_s_own_changes() -> None:
    recipe = read_recipe("ablations/table4-a0-b1", ["--stages.spike.beta=0.5", "name=mine"])
    assert (recipe.name, recipe.stages["spike"].alpha, recipe.stages["spike"].beta) == ("mine", 0.0, 0.5)


def test_names_may_be_dotted_in_a_file_too(tmp_path: Path) -> None:
    head = "name: mine\nteacher: t\ndata.source: a.txt\nstages: {}\n"
    recipe = read_text(tmp_path, head + "mixer.init: llamba")
    assert (recipe.data.source, recipe.mixer.init) == ("a.txt", "llamba")
    with pytest.raises(ValueError, match=r"there is no setting 'mixer\.itin'"):
        read_text(tmp_path, head + "mixer.itin: {}")


def test_overrides_change_single_settings() -> None:
    plain = read_shipped("quickstart")
    changes = [
        "stages.align.train.tokens=64",
        "--data.source=[a.txt, b.txt]",
        "neurons.per_site.down_proj.time_steps=9",
        "evaluation.data.source=*.txt",
        "stages.align.train.tokens=96",
    ]
    recipe = read_recipe("quickstart", changes)
    assert recipe.stages["align"].train == replace(plain.stages["align"].train, tokens=96)
    assert recipe.stages["spike"] == plain.stages["spike"]
    assert recipe.data == replace(plain.data, source=["a.txt", "b.txt"])
    assert recipe.neurons.by_site()["down_proj"]["time_steps"] == 9
    assert recipe.evaluation.data == DataConfig(source="*.txt")


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, HEAD + "stages: {first: {kind: align, train: {lr: 2e-3, tokens: 1_000}}}")
    assert recipe.stages["first"].train.lr == 2e-3
    assert recipe.stages["first"].train.tokens == 1000
    assert recipe.neurons == NeuronSettings()


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = read_shipped("quickstart")
    assert read_text(tmp_path, yaml.safe_dump(asdict(recipe) | {"stages": _plain(recipe)})) == recipe


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The stages with the one value that plain YAML has no word for, a tuple, as a list."""
    stages = asdict(recipe)["stages"]
    for stage in stages.values():
        stage["train"]["betas"] = list(stage["train"]["betas"])
    return stages


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stages: {}\ntecher: x", "techer"),
        ("stages: {}\ndata: {source: x, lenght: 3}", "lenght"),
        ("stages: {}\nmixer: {present: fast}", "present"),
        ("stages: {}\nneurons: {default: {T: 4}}", "T"),
        ("stages: {}\nneurons: {per_site: {down_proj: {T: 4}}}", r"neurons\.per_site\.down_proj has no setting 'T'"),
        ("stages: {}\nneurons: {per_site: {down: {time_steps: 4}}}", "'down'"),
        ("stages: {}\nneurons: {per_site: {down_proj: {time_steps: many}}}", "time_steps is 'many'; .* an integer"),
        ("stages: {}\nneurons: {per_site: {down_proj: {time_steps: 2.5}}}", r"time_steps is 2\.5; .* an integer"),
        ("stages: {}\nneurons: {sites: [in_proj, middle]}", "'middle'"),
        ("stages: {}\nneurons: {default: {kind: quaternary}}", "'quaternary'; use one of 'atmn'"),
        ("stages: {a: {kind: align, tokens: 5}}", "tokens"),
        ("stages: {a: {kind: align, train: {tokns: 5}}}", "tokns"),
        ("stages: {a: {kind: align, train: {tokens: five}}}", r"train\.tokens.*five"),
        ("stages: {a: {kind: align, train: {tokens: 0}}}", "tokens is 0; it must be at least 1"),
        ("stages: {a: {kind: aling}}", "'align'.*aling"),
        ("stages: {a: {train: {tokens: 5}}}", "required: kind"),
        ("stages: {a: {kind: spike, features: wild}}", "'pre', 'post'.*wild"),
        ("stages: {a: {kind: distill, trained: some}}", "'mixers'.*some"),
        ("stages: {a: {kind: align, trian: {}}}", r"there is no setting 'stages\.a\.trian'; use one of kind, train"),
        ("stages: {a: {kind: align, train: {tokns: {}}}}", r"there is no setting 'stages\.a\.train\.tokns'"),
        ("stages: {}\nmixr: {}", "there is no setting 'mixr'"),
        ("stages: {}\nmixer: {present: {}}", r"there is no setting 'mixer\.present'"),
        ("stages: {}\nneurons: {default: {T: {}}}", r"there is no setting 'neurons\.default\.T'"),
        ("stages: {}\nneurons: {per_site: {down_proj: {T: {}}}}", r"neurons\.per_site\.down_proj has no setting 'T'"),
        (
            "data: {source: x}\nstages: {}\nevaluation: {data: {source: x, lenght: {}}}",
            r"there is no setting 'evaluation\.data\.lenght'",
        ),
        ("stages: 3", "stages"),
        ("stages: {}\nmixer: {preset: slow}", r"mixer\.preset.*slow"),
        ("stages: {a: {kind: spike}, b: {kind: align}}", "dense stage after a spiking one; put align"),
        ("stages: {a: [", "is not YAML: while parsing .*; mend it there"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(tmp_path: Path, text: str, problem: str) -> None:
    head = HEAD.replace("data: {source: a.txt}\n", "") if "data:" in text else HEAD
    with pytest.raises(ValueError, match=problem) as caught:
        read_text(tmp_path, head + text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *("stages.algin.train.tokens=3", "data.sauce=3", "tokens=3", "stages.align.train=", "x"),
        *("stages.align.trian={}", "--stages.align.train.x={}", "stages.align={kind: align, trian: {}}"),
    ],
)
def test_overrides_of_nothing_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"^Recipe quickstart: ") as caught:
        read_recipe("quickstart", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["quickstrat", "ablations/base", "ablations/rows", "ablations", "../recipes/quickstart"]
)
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a YAML file or one of .*quickstart.*ablations/table2-1"):
        read_recipe(name)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"required: teacher, data\.source, stages"):
        read_text(tmp_path, "name: mine")


def test_dense_stages_come_first() -> None:
    dense, spiking = StageConfig(kind="distill"), StageConfig(kind="spike_align")
    data = DataConfig(source="a.txt")
    Recipe("good", "t", data, {"a": dense, "b": spiking, "c": spiking})
    with pytest.raises(ValueError, match="Recipe 'bad' has a dense stage after a spiking one"):
        Recipe("bad", "t", data, {"a": dense, "b": spiking, "c": dense})


@pytest.mark.parametrize("name", shipped_recipes())
def test_debug_size_is_small_and_a_copy(name: str) -> None:
    recipe = read_shipped(name)
    before = asdict(recipe)
    small = debug_size(recipe)
    assert asdict(recipe) == before
    assert small.data.length * small.evaluation.window <= 64 * 64
    assert small.writing.tokens + small.writing.held_out_tokens < 1000
    for stage in small.stages.values():
        assert stage.train.steps(small.data.length) == 2
    assert [asdict(stage) | {"train": 0} for stage in small.stages.values()] == [
        asdict(stage) | {"train": 0} for stage in recipe.stages.values()
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("name", ["alpha", "beta", "threshold_lr_scale", "energy_target", "energy_weight"])
def test_weights_of_a_loss_are_numbers_from_0_up(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a number from 0 up"):
        StageConfig("spike", **{name: value})  # type: ignore[arg-type]
