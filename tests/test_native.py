"""The native core: its variants, its integer and float kernels on each of them, what it is handed, its threads.

Processes that run another variant import this file without torch, which takes longer to load than all they do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mar import _native
from mar.compact import GROUP, from_bf16, quantise_int4, quantise_int8, to_bf16
from mar.engine import Engine, layout, pack
from mar.engine.pack import PackSettings

NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"},
}
NEEDS["amx"] = NEEDS["avx512"] | {"amx_tile", "amx_int8"}
"""Variants and the flags of /proc/cpuinfo that they need."""

SHAPES = [(1, 1), (3, 64), (5, 65), (40, 300), (63, 130), (65, 64), (72, 1216), (200, 1300), (1030, 70), (70, 8420)]
"""Inputs and outputs: less than a quad and a slice, a little more and less than groups and panels, over 128 slices."""


def flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def here() -> list[str]:
    """Variants that this CPU runs."""
    return [name for name, needed in NEEDS.items() if needed <= flags()]


def others() -> list[str]:
    return [name for name in here() if name != _native.variant()["name"]]


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code that finds this file; the engine must not need torch, so its import is an error."""
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    code = "import sys; sys.modules['torch'] = None\n" + code
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **variables},
        timeout=120,
    )


# What each linear has to give


def codes_of(inputs: int, share: float, largest: int, random: np.random.Generator) -> np.ndarray:
    codes = random.integers(-largest, largest + 1, inputs) * (random.random(inputs) < share)
    return codes.astype(np.int8)


def meaning(weight: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """What a packed weight stands for: numbers (inputs, outputs), and by what their sums are still to be multiplied."""
    if precision == "int8":
        stored, scales = quantise_int8(weight.T)
        return stored.astype(np.int64), scales
    if precision == "int4":
        stored, scales = quantise_int4(np.ascontiguousarray(weight.T))
        values = stored * from_bf16(scales).repeat(GROUP, axis=0)[: len(stored)]
    else:
        values = weight.T if precision == "fp32" else from_bf16(to_bf16(weight.T))
    return values.astype(np.float64), np.ones(len(weight), np.float32)


def check_linears() -> None:
    """Outputs against their definition, for every precision, share of codes and thread count, zeros read or not.

    int8 must be the sum of integers times the scale in fp32, bit for bit; the others may round as fp32 sums do.
    """
    random = np.random.default_rng(0)
    for inputs, outputs in SHAPES:
        weight = random.standard_normal((outputs, inputs)) * np.exp(random.normal(0, 2, (outputs, 1)))
        weight = weight.astype(np.float32)
        weight[random.random(outputs) < 0.1] = 0
        for precision in pack.PRECISIONS:
            linears = []
            for panel in {layout.PANEL, _native.PANEL, 200}:  # the last longer than rows that are worked on at once
                packed = layout.pack_linear(weight, precision, panel).items()
                arrays = {
                    f"linear.{kind}": np.ascontiguousarray(one).reshape(-1).view(np.uint8) for kind, one in packed
                }
                linears += [_native.Linear(precision, inputs, outputs, arrays, panel, threads) for threads in (1, 3)]
            values, factors = meaning(weight, precision)
            for share, largest in ((0.0, 1), (0.05, 4), (0.3, 127), (1.0, 16), (1.0, 127)):
                codes = codes_of(inputs, share, largest, random)
                wanted = (codes @ values).astype(np.float32) * factors
                near = np.abs(codes[:, None] * values).sum(0) * max(inputs, 8) * 2.0**-24 * (precision != "int8")
                found = []
                for linear in linears:
                    for every in (False, True):
                        out = np.full((1, linear.outputs), np.nan, np.float32)
                        linear.multiply(codes, every, out)
                        found.append(out[0])
                what = f"{precision}, {inputs} to {outputs}, {share} of codes up to {largest}"
                assert (np.abs(found[0][:outputs] - wanted) <= near).all(), what
                assert not found[0][outputs:].any(), what
                assert all(np.array_equal(found[0], other) for other in found[1:]), what


def outputs(folder: Path) -> dict[str, np.ndarray]:
    """Whatever a dense and a spiking model give: many tokens, token by token, several sequences, codes replayed."""
    with np.load(folder / "given.npz") as given:
        ids, codes = given["ids"], given["codes"]
    found: dict[str, np.ndarray] = {}
    for precision in pack.PRECISIONS:
        dense, spiking = (
            Engine.from_pretrained(folder / name, precision=precision, head=precision, cache=folder, threads=1)
            for name in ("dense", "spiking")
        )
        found[f"{precision} wide"] = dense.logits(dense.new_state(), ids)
        state = dense.new_state()
        found[f"{precision} steps"] = np.stack([dense.step(state, int(token)) for token in ids])
        states = [dense.new_state() for _ in range(5)]
        together = [dense.step_batch(states, [int(ids[(t + i) % len(ids)]) for i in range(5)]) for t in range(6)]
        found[f"{precision} batch"] = np.stack([one[0] for one in together])
        state = spiking.new_state()
        pairs = [spiking.step_codes(state, int(token), row) for token, row in zip(ids, codes, strict=True)]
        found[f"{precision} replayed"] = np.stack([logits for logits, _ in pairs])
        found[f"{precision} codes"] = np.stack([taken for _, taken in pairs])
    return found


def ratio(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the difference over RMS of what is wanted."""
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a spiking model, tokens, and torch's logits, codes and closeness to thresholds."""
    from tiny_engine import RAGGED, run_torch, saved, spiking_model, tokens
    from tiny_models import mar_model

    folder = tmp_path_factory.mktemp("native")
    ids = tokens(40)
    dense, spiking = mar_model(**RAGGED), spiking_model()
    for name, model in (("dense", dense), ("spiking", spiking)):
        saved(model, folder / name)
    logits, codes, near = run_torch(spiking, ids)
    np.savez(
        folder / "given.npz",
        ids=ids.numpy().astype(np.int32),
        codes=codes,
        near=near,
        spiking=logits,
        dense=run_torch(dense, ids)[0],
    )
    return folder


def compare(found: dict[str, np.ndarray], folder: Path) -> None:
    """One variant's outputs with torch's and among each other."""
    with np.load(folder / "given.npz") as given:
        for way in ("wide", "steps"):
            assert np.abs(found[f"fp32 {way}"] - given["dense"]).max() < 1e-4
        assert np.abs(found["fp32 replayed"] - given["spiking"]).max() < 1e-4
        for precision, limit in (("bf16", 0.04), ("int8", 0.1), ("int4", 0.7)):
            assert ratio(found[f"{precision} wide"], given["dense"]) < limit
            assert ratio(found[f"{precision} replayed"], given["spiking"]) < limit / 3
        differ = found["fp32 codes"] != given["codes"]
        assert not (differ & ~given["near"]).any()
    for precision in pack.PRECISIONS:
        steps = found[f"{precision} steps"]
        # Inputs of dense bf16 and integer linears are rounded themselves, now and then to another side.
        limit = 1e-5 if precision == "fp32" else 0.02
        assert ratio(found[f"{precision} wide"], steps) < limit
        assert ratio(found[f"{precision} batch"], steps[: len(found[f"{precision} batch"])]) < limit
    assert np.array_equal(found["int8 batch"], found["int8 steps"][:6])


def test_the_best_variant_is_chosen_and_named():
    found = python("from mar import _native; print(_native.variant())", MAR_ISA="").stdout
    assert f"'name': '{here()[-1]}'" in found
    assert "the best that this CPU runs" in found


@pytest.mark.parametrize("name", NEEDS)
def test_a_variant_is_forced_or_refused(name: str):
    done = python("import mar.engine; from mar import _native; print(*_native.variant().values())", MAR_ISA=name)
    if name in here():
        assert done.stdout.startswith(f"{name} forced by MAR_ISA (needs ")
    else:
        assert done.returncode == 1, "an error, and no signal"
        assert f"ValueError: MAR_ISA is '{name}', but this CPU lacks" in done.stderr


@pytest.mark.parametrize("name", ["avx1024", "AVX2", " "])
def test_an_unknown_variant_is_refused_in_one_sentence(name: str):
    done = python("import mar.engine", MAR_ISA=name)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == f"ValueError: MAR_ISA is '{name}'; use one of amx, avx512, avxvnni, avx2, generic."
    )


def test_linears_give_what_their_weights_define():
    check_linears()


def test_models_give_what_torch_gives(models: Path):
    compare(outputs(models), models)


def test_all_variants_give_the_same(models: Path):
    first = outputs(models)
    code = (
        "import test_native as t; from pathlib import Path; import numpy as np\n"
        "t.check_linears(); np.savez(sys.argv[2], **t.outputs(Path(sys.argv[1])))"
    )
    for name in others():
        done = python(code, str(models), str(models / f"{name}.npz"), MAR_ISA=name)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        with np.load(models / f"{name}.npz") as arrays:
            found = dict(arrays)
        compare(found, models)
        for precision in pack.PRECISIONS:
            # codes are given, so only the head's inputs are rounded
            limit = 1e-5 if precision == "fp32" else 0.02
            assert ratio(found[f"{precision} replayed"], first[f"{precision} replayed"]) < limit


# What the core is handed


@pytest.fixture(scope="module")
def parts(models: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and arrays of the spiking model in int8."""
    config, weights, _ = pack.read_folder(models / "spiking")
    settings = PackSettings("int8")
    return pack.engine_settings(config, settings), pack.pack(config, weights, settings)


WRONG = [0, -1, -(2**31), 2**24 + 1, 2**28, 2**31, 2**63 - 1, 2**64, 2**70]
WRONG += [1.5, float("nan"), "40", b"40", None, [40]]
REFUSED = r"makes no model|missing or of another type|bytes instead of|has no '|up to 16"
SIZES = [*pack.SIZES, "panel"]


def core(settings: dict[str, Any], arrays: dict[str, Any], threads: int = 1) -> Any:
    return _native.Model(settings, arrays, threads)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_make_no_model_are_refused(parts, name: str):
    without = {key: value for key, value in parts[0].items() if key != name}
    for settings in (without, *(parts[0] | {name: value} for value in WRONG)):
        with pytest.raises(ValueError, match=REFUSED):
            core(settings, parts[1])


@pytest.mark.parametrize("name", pack.SIZES)
def test_sizes_that_are_others_are_refused(parts, name: str):
    size = parts[0][name]
    # a model may have more layers than it uses
    for value in (size + 1, 2 * size, 1000 * size, *([] if name == "num_hidden_layers" else [size - 1])):
        with pytest.raises(ValueError, match=REFUSED):
            core(parts[0] | {name: value}, parts[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "int2"), ("precision", 8), ("precision", "int4"), ("precision", None), ("head_precision", "fp32"),
        ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")), ("rms_norm_eps", -1.0), ("rms_norm_eps", "1"),
        ("gain", -1), ("unit", 2**40), ("gain", "yes"),
        ("in_proj.encoder", None), ("in_proj.encoder", ()), ("in_proj.encoder", (-4, 4)),
        ("in_proj.encoder", (-4, 4, False, 0)), ("in_proj.encoder", (-128, 4, False)),
        ("in_proj.encoder", (1, 4, False)), ("in_proj.encoder", (-4, 0, False)), ("in_proj.encoder", (-4, 128, False)),
        ("in_proj.encoder", (-(2**40), 4, False)), ("in_proj.encoder", ("a", 4, False)),
        ("in_proj.encoder", (-100, 100, False)),
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_that_make_no_model_are_refused(parts, name: str, value: Any):
    with pytest.raises(ValueError, match=r"^[^\n]+\.$"):
        core(parts[0] | {name: value}, parts[1])


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(0, 1), (1, 0), (-5, 64), (64, -64), (2**25, 1), (2**16 + 1, 1)], ids=str
)
def test_linears_of_sizes_that_make_none_are_refused(inputs: int, outputs: int):
    with pytest.raises(ValueError, match=r"makes no model|takes up to 65536"):
        _native.Linear("int8", inputs, outputs, {}, layout.PANEL, 1)


def test_arrays_of_another_size_or_kind_are_refused(parts):
    settings, arrays = parts
    for name, array in arrays.items():
        wrong: list[Any] = [
            array[:-1],
            array[:0],
            np.append(array, array[:1]),
            array.astype(np.float32),
            array.reshape(1, -1),
        ]
        wrong += [np.repeat(array, 2)[::2], None, "bytes"]
        for one in wrong[:: 1 if name.startswith("layers.0.in_proj") else 3]:
            with pytest.raises(ValueError, match=r"bytes instead of|no flat array"):
                core(settings, arrays | {name: one})
        if name.endswith((".bias", ".threshold", ".multiplier")) or name in ("embedding", "head.words"):
            continue
        with pytest.raises(ValueError, match=f"The packed model has no '{re.escape(name)}'"):
            core(settings, {other: value for other, value in arrays.items() if other != name})


def test_arrays_off_their_alignment_are_refused(parts):
    settings, arrays = parts
    name = "layers.0.decay_weight"
    moved = np.zeros(arrays[name].size + 1, np.uint8)[1:]
    with pytest.raises(ValueError, match="no flat array of aligned bytes"):
        core(settings, arrays | {name: moved})


def test_multipliers_that_leave_8_bits_are_refused(parts):
    settings, arrays = parts
    for value in (0, -1, 127 // 4 + 1, -128):
        wrong = arrays["layers.0.in_proj.multiplier"].copy()
        wrong.view(np.int8)[7] = value
        with pytest.raises(ValueError, match="takes codes beyond 8 bits"):
            core(settings, arrays | {"layers.0.in_proj.multiplier": wrong})


def test_any_bytes_in_the_arrays_are_survived(parts):
    """Sizes are checked, values are not: NaN, zero thresholds and the rest give wrong numbers and nothing worse."""
    settings, arrays = parts
    random = np.random.default_rng(0)
    for _ in range(10):
        noise = {
            name: array if name.endswith(".multiplier") else random.integers(0, 256, array.size, dtype=np.uint8)
            for name, array in arrays.items()
        }
        model = core(settings, noise, 2)
        state, out = model.new_state(), np.empty((70, model.outputs), np.float32)
        model.forward([state], np.arange(70, dtype=np.int32), True, out)
        model.forward([state], np.arange(1, dtype=np.int32), True, out[:1])
        assert state.tokens == 71


def test_tokens_states_and_rows_that_do_not_go_together_are_refused(parts):
    model, other = core(*parts), core(*parts)
    state, out = model.new_state(), np.empty((2, model.outputs), np.float32)
    ids = np.array([1, 2], np.int32)
    cases: list[tuple[list[Any], np.ndarray, bool, np.ndarray, str]] = [
        ([], ids, True, out, "0 states do not go with 2 tokens"),
        ([state], ids[:0], True, out[:0], "There are no tokens"),
        ([state, model.new_state(), model.new_state()], ids, True, out, "3 states do not go with 2 tokens"),
        ([state, state], ids, True, out, "given more than once"),
        ([state, None], ids, True, out, "None is no state"),
        ([state], ids, False, out, "logits must have 1 rows"),
        ([state], ids, True, out[:1], "logits must have 2 rows"),
        ([state], ids, True, np.empty((2, 300), np.float32), "logits must have 2 rows of 320"),
    ]
    for states, tokens, every, logits, message in cases:
        with pytest.raises(ValueError, match=message):
            model.forward(states, tokens, every, logits)
    for wrong in (ids.astype(np.int64), ids.astype(np.float32), ids[None], [1, 2]):
        with pytest.raises(TypeError):
            model.forward([state], wrong, True, out)
    for logits in (np.empty((2, model.outputs)), out[:, ::2], out.T):
        with pytest.raises(TypeError):
            model.forward([state], ids, True, logits)
    for token in (-1, 300, 2**31 - 1, -(2**31)):
        with pytest.raises(IndexError, match="is not in the vocabulary of 300; use 0 to 299"):
            model.forward([state], np.array([1, token], np.int32), True, out)
    assert state.tokens == 0
    assert not state.conv().any()
    assert not state.ssm().any()
    other.forward([state], ids, True, out)  # of the same shape: another engine of the same model may go on


def test_a_state_of_another_shape_is_refused(parts, models: Path):
    config, weights, _ = pack.read_folder(models / "dense")
    settings = PackSettings("fp32")
    one_layer = {name: value for name, value in weights.items() if ".layers.1." not in name}
    smaller = config | {"num_hidden_layers": 1}
    model = core(pack.engine_settings(smaller, settings), pack.pack(smaller, one_layer, settings))
    out = np.empty((1, model.outputs), np.float32)
    with pytest.raises(ValueError, match="belongs to a model of another shape"):
        model.forward([core(*parts).new_state()], np.array([1], np.int32), True, out)


def test_codes_that_are_given_are_checked(parts):
    model = core(*parts)
    state, out, taken = model.new_state(), np.empty((1, model.outputs), np.float32), np.zeros(model.code_count, np.int8)
    hidden = parts[0]["hidden_size"]
    for place, value in ((0, 5), (3, -5), (hidden, -1), (hidden, 4), (0, -128)):
        codes = np.zeros_like(taken)
        codes[place] = value
        with pytest.raises(ValueError, match=f"The code {value} is beyond its neuron's"):
            model.step_codes(state, 1, codes, taken, out)
    for wrong in (taken[:-1], np.append(taken, taken[:1])):
        with pytest.raises(ValueError, match="codes instead of"):
            model.step_codes(state, 1, wrong, taken, out)
        with pytest.raises(ValueError, match="codes instead of"):
            model.step_codes(state, 1, None, wrong, out)
    with pytest.raises(TypeError):
        model.step_codes(state, 1, taken.astype(np.int32), taken, out)
    with pytest.raises(TypeError):
        model.step_codes(None, 1, None, taken, out)
    assert state.tokens == 0


# Threads


@pytest.mark.parametrize("threads", [0, -1, 257, 2**31 - 1])
def test_thread_counts_that_make_no_pool_are_refused(parts, threads: int):
    with pytest.raises(ValueError, match=f"threads is {threads}; use 1 to 256"):
        core(*parts, threads)


def test_threads_that_the_system_refuses_are_named(models: Path):
    """Their stacks do not fit what the process may have: an error, not an abort, and fewer still work."""
    code = """
import resource
from pathlib import Path
from mar.engine import Engine
open_it = lambda threads: Engine.from_pretrained(Path(sys.argv[1]) / "dense", cache=Path(sys.argv[1]), threads=threads)
open_it(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
try:
    open_it(256)
except ValueError as error:
    print(error)
engine = open_it(2)
print(engine.prefill(engine.new_state(), [1, 2, 3]).shape)
"""
    done = python(code, str(models))
    assert done.returncode == 0, done.stderr
    message, shape = done.stdout.splitlines()
    assert re.fullmatch(r"threads is 256, but no more than \d+ could be started \(.*\); use fewer\.", message)
    assert shape == "(300,)"


def test_more_threads_than_cores(parts):
    """As many as 16 meet at every barrier of many short calls, on whatever cores there are."""
    results = []
    for threads in (1, 16):
        model = core(*parts, threads)
        state, out = model.new_state(), np.empty((1, model.outputs), np.float32)
        for token in range(10):
            model.forward([state], np.array([token], np.int32), False, out)
        results.append(out.copy())
    assert np.array_equal(*results)


def test_calls_from_several_threads_take_turns(parts):
    """Six Python threads on two models that share two worker threads: each gets what it would get alone."""
    models = [core(*parts, 2), core(*parts, 2)]

    def run(number: int) -> np.ndarray:
        model = models[number % 2]
        state, found = model.new_state(), []
        for turn in range(10):
            ids = np.arange(number, number + 1 + 40 * (turn % 5 == number % 5), dtype=np.int32) % 300
            out = np.empty((1, model.outputs), np.float32)
            model.forward([state], ids, False, out)
            model.counts()
            found.append(out)
        return np.stack(found)

    alone = [run(number) for number in range(6)]
    for model in models:
        model.reset_counts()
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(run, range(6)))
    assert all(np.array_equal(*both) for both in zip(alone, together, strict=True))
    assert sum(model.counted_tokens() for model in models) == 6 * (10 + 2 * 40)
