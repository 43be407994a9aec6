"""Packed files: what quantising may cost, layouts read back, damage of every kind refused, writers that meet."""

import hashlib
import json
import mmap
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mar import _native, compact
from mar import folder as torch_folder
from mar.compact import GROUP
from mar.config import NeuronConfig
from mar.engine import Engine, layout, pack, pages
from mar.engine.layout import QUAD, SLICE
from mar.engine.pack import PackSettings
from tiny_models import mar_model

SEEDS = st.integers(0, 2**32 - 1)


def rows_of(seed: int, inputs: int, outputs: int) -> np.ndarray:
    """Input-major weights of very different sizes, a tenth of the outputs and some of the inputs all zero."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((inputs, outputs)) * np.exp(random.normal(0, 3, outputs))
    rows[:, random.random(outputs) < 0.1] = 0
    rows[random.random(inputs) < 0.1] = 0
    return rows.astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 200), st.integers(1, 70))
def test_int8_is_the_nearest_of_255_levels(seed, inputs, outputs):
    rows = rows_of(seed, inputs, outputs)
    codes, scales = compact.quantise_int8(rows)
    assert np.abs(codes).max(initial=0) <= 127
    assert (np.abs(codes * scales - rows) <= scales * 0.50001).all()
    assert (np.abs(codes).max(0)[scales > 0] == 127).all()
    assert not codes[:, ~rows.any(0)].any()
    assert not scales[~rows.any(0)].any()


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 200), st.integers(1, 70))
def test_int4_is_at_least_as_near_as_scales_by_the_largest(seed, inputs, outputs):
    rows = rows_of(seed, inputs, outputs)
    codes, scales = compact.quantise_int4(rows)
    groups = -(-inputs // GROUP)
    assert codes.shape == rows.shape
    assert scales.shape == (groups, outputs)
    assert codes.min(initial=0) >= -8
    assert codes.max(initial=0) <= 7
    for group in range(groups):
        part = slice(group * GROUP, (group + 1) * GROUP)
        scale = compact.from_bf16(scales[group])
        error = np.square(codes[part] * scale - rows[part]).sum(0)
        largest = rows[part][np.abs(rows[part]).argmax(0), np.arange(outputs)]
        plain = compact.from_bf16(compact.to_bf16(largest / -8))
        nearest = np.rint(rows[part] / np.where(plain != 0, plain, 1)).clip(-8, 7) * plain
        assert (error <= np.square(nearest - rows[part]).sum(0) * 1.0001).all()
        assert not codes[part][:, largest == 0].any()


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 80), st.integers(1, 127), st.floats(0, 4))
def test_multiplied_codes_fit_8_bits_and_rows_a_common_unit(seed, channels, steps, spread):
    v = np.exp(np.random.default_rng(seed).normal(0, spread, channels)).astype(np.float32)
    multipliers = compact.row_multipliers(v, steps)
    assert multipliers.dtype == np.int8
    assert multipliers.min() >= 1
    assert int(multipliers.max()) * steps <= 127
    unit = v.max() / (127 // steps)
    assert (v / multipliers <= unit * 1.001).all(), "no row is larger than the unit, but for rounding"
    # a factor more would have been needless: the row without it would have been too large
    assert ((multipliers == 1) | (v / np.maximum(multipliers - 1, 1) > unit)).all()


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 1000))
def test_bf16_as_torch_rounds_it(seed, count):
    values = rows_of(seed, count, 1)[:, 0]
    bits = compact.to_bf16(values)
    rounded = torch.from_numpy(values).bfloat16()
    assert np.array_equal(bits, rounded.view(torch.uint16).numpy())
    assert np.array_equal(compact.from_bf16(bits), rounded.float().numpy())


def unpacked(stored: np.ndarray, scales: np.ndarray | None, precision: str, inputs: int, outputs: int) -> np.ndarray:
    """The weight (outputs, inputs) that a linear's bytes stand for, read as docs and csrc/kernels.hpp lay them out."""
    unit = 2 if precision == "int4" else 1
    slices = -(-outputs // (unit * SLICE)) * unit
    rows = -(-inputs // QUAD) * QUAD if precision.startswith("int") else inputs
    size = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}[precision]
    raw = stored.reshape(-1).view(np.uint8)
    assert raw.nbytes == rows * slices * SLICE * size
    panels = -(-slices // layout.PANEL)
    width = -(-slices // (panels * unit)) * unit
    found, at = [], 0
    for start in range(0, slices, width):
        line = int(min(width, slices - start) * SLICE * size)
        found.append(raw[at : at + rows * line].reshape(rows, line))
        at += rows * line
    matrix = np.concatenate(found, axis=1)
    if precision == "fp32":
        values = matrix.view(np.float32)
    elif precision == "bf16":
        values = compact.from_bf16(matrix.view(np.uint16))
    elif precision == "int8":
        assert scales is not None
        values = (matrix.astype(np.float32) - 128) * scales
    else:
        assert scales is not None
        lines = matrix.reshape(rows, -1, SLICE)
        nibbles = np.stack([lines & 15, lines >> 4], axis=2).reshape(rows, -1)
        places = np.array([place_of_scale(output) for output in range(scales.shape[1])])
        values = (nibbles.astype(np.float32) - 8) * compact.from_bf16(scales)[:, places].repeat(GROUP, axis=0)[:rows]
    assert not values[inputs:].any()
    assert not values[:, outputs:].any()
    return values[:inputs, :outputs].T


def place_of_scale(output: int) -> int:
    """csrc/kernels.hpp's scale_place, within each two slices."""
    pair, within = divmod(output, 2 * SLICE)
    half, column = divmod(within, SLICE)
    return pair * 2 * SLICE + 2 * (column // 4 % 4 * 16 + column // 16 * 4 + column % 4) + half


def streamed(packed: dict[str, np.ndarray], inputs: int, outputs: int) -> np.ndarray:
    """Values (outputs, inputs) of an int4 weight's stream, one by one."""
    weights, scales = packed["stream.weights"], compact.from_bf16(packed["stream.scales"])
    values = np.empty((outputs, inputs), np.float32)
    for output, inp in np.ndindex(outputs, inputs):
        pair, within = divmod(output, 2 * SLICE)
        half, place = divmod(within, SLICE)
        byte = weights[pair, place // 32, inp // QUAD, place % 32, inp % QUAD]
        nibble = byte >> 4 if half else byte & 15
        values[output, inp] = (np.float32(nibble) - 8) * scales[pair, inp // GROUP, within]
    return values


@pytest.mark.parametrize("precision", pack.PRECISIONS)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (40, 64), (72, 300), (200, 1300), (63, 2500)])
def test_linears_are_read_back(precision, inputs, outputs):
    weight = np.random.default_rng(inputs).standard_normal((outputs, inputs)).astype(np.float32)
    packed = layout.pack_linear(weight, precision)
    back = unpacked(packed["weights"], packed.get("scales"), precision, inputs, outputs)
    assert ("stream.weights" in packed) == (precision == "int4")
    if precision == "int4":
        assert np.array_equal(streamed(packed, inputs, outputs), back)
    largest = np.abs(weight).max(1, keepdims=True)
    relative = {"fp32": 0, "bf16": 2**-8, "int8": 0.501 / 127, "int4": 0.17}[precision]
    assert (np.abs(back - weight) <= relative * largest).all()


def test_gate_and_up_lie_side_by_side():
    gate, up = np.arange(200)[:, None] + np.zeros(3), -np.arange(200)[:, None] - np.zeros(3)
    both = layout.alternate(gate, up).reshape(-1, 2, SLICE, 3)
    assert both.shape == (4, 2, SLICE, 3)
    assert np.array_equal(both[:, 0].reshape(-1, 3)[:200], gate)
    assert np.array_equal(both[:, 1].reshape(-1, 3)[:200], up)
    assert not both[3, :, 8:].any()


def test_constants_are_those_of_the_core_and_of_the_config():
    from mar.config import SITES

    assert (SLICE, QUAD, GROUP) == (_native.SLICE, _native.QUAD, _native.GROUP)
    assert SITES == pack.SITES
    defaults = asdict(NeuronConfig())
    assert {name: defaults[name] for name in pack.NEURON} == pack.NEURON


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "student"
    mar_model(neurons={"in_proj": {}, "down_proj": {"time_steps": 16}}).save_pretrained(path)
    return path


@pytest.fixture
def copied(student: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((student / name).read_bytes())
    return tmp_path


def packed(folder: Path, cache: Path, precision: str = "int8", head: str | None = None) -> Path:
    return pack.packed_file(folder, PackSettings(precision, head, panel=_native.PANEL), cache)


def test_nobody_may_write_into_a_packed_file(student: Path, tmp_path: Path):
    assert packed(student, tmp_path).stat().st_mode & 0o777 == 0o400


def test_packed_once_for_each_content_and_setting(copied: Path):
    cache = copied / "cache"
    first = packed(copied, cache)
    written = first.stat().st_mtime_ns
    assert packed(copied, cache) == first
    assert first.stat().st_mtime_ns == written
    others = {packed(copied, cache, "int4"), packed(copied, cache, "int8", "fp32")}
    others.add(pack.packed_file(copied, PackSettings("int8", neurons=False), cache))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    others.add(packed(copied, cache))
    assert len(others | {first}) == 5
    assert sorted(cache.iterdir()) == sorted(others | {first})


def test_the_key_is_the_folders_digest(student: Path, tmp_path: Path):
    digest = torch_folder.digest(student)
    assert pack.folder_digest(student) == pack.read_folder(student)[2] == digest
    header, _ = pack.open_packed(packed(student, tmp_path))
    assert header["source"] == digest


def test_the_cache_is_the_users(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "own"))
    assert pack.cache_folder() == tmp_path / "own" / "packed"
    monkeypatch.delenv("MAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert packed(student, None).parent == tmp_path / "cache" / "mar" / "packed"  # type: ignore[arg-type]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pack.cache_folder() == Path.home() / ".cache" / "mar" / "packed"


def spoilt(whole: bytes, count: int = 60) -> list[bytes]:
    """The file cut off, with bytes changed in header and contents, with a byte more, and nothing of it."""
    random = np.random.default_rng(0)
    places = [*range(0, 60), *random.integers(0, pack.ALIGNMENT, 40), *random.integers(0, len(whole), count)]
    found = [whole + b"\0", bytes(len(whole)), b""]
    for place in places:
        found.append(whole[:place])
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        found.append(bytes(flipped))
    return found


def test_a_damaged_file_is_refused_in_one_sentence(student: Path, tmp_path: Path):
    whole = packed(student, tmp_path).read_bytes()
    place = tmp_path / "spoilt.marpack"
    for content in spoilt(whole):
        place.write_bytes(content)
        for share in (True, False):
            with pytest.raises(ValueError, match=r"^\S+ is damaged \([^.]*\); remove it, and it is packed again\.$"):
                pack.open_packed(place, share)


def test_a_damaged_file_is_packed_again(student: Path, tmp_path: Path):
    place = packed(student, tmp_path)
    whole = place.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole[:3000] + b"?" + whole[3001:]):
        place.write_bytes(content)
        Engine.from_pretrained(student, cache=tmp_path, threads=1)
        assert place.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [place]


def forged(place: Path, length: int | None, header: bytes) -> None:
    """A file with any header whose digest is right."""
    body = (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(5000)
    place.write_bytes(pack.MAGIC + hashlib.sha256(body).digest() + body)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b'"arrays"', b"[" * 4000,
        {}, {"settings": {}}, {"settings": {}, "arrays": []}, {"settings": 3, "arrays": {}},
        {"settings": {}, "arrays": {"a": [0]}}, {"settings": {}, "arrays": {"a": "ab"}},
        {"settings": {}, "arrays": {"a": [-1, 3]}}, {"settings": {}, "arrays": {"a": [0, -3]}},
        {"settings": {}, "arrays": {"a": [0, 2**70]}}, {"settings": {}, "arrays": {"a": [2**70, 1]}},
        {"settings": {}, "arrays": {"a": [float("inf"), 1]}}, {"settings": {}, "arrays": {"a": [float("nan"), 1]}},
        {"settings": {}, "arrays": {"a": [None, {}]}},
    ],
    ids=lambda header: str(header)[:40],
)  # fmt: skip
def test_a_header_made_to_deceive_is_refused(header: bytes | dict[str, Any], tmp_path: Path):
    place = tmp_path / "forged.marpack"
    forged(place, None, header if isinstance(header, bytes) else json.dumps(header).encode())
    with pytest.raises(ValueError, match="is damaged"):
        pack.open_packed(place)


@pytest.mark.parametrize("length", [1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(length: int, tmp_path: Path):
    forged(tmp_path / "forged.marpack", length, b'{"settings": {}, "arrays": {}}')
    with pytest.raises(ValueError, match="is damaged"):
        pack.open_packed(tmp_path / "forged.marpack")


def test_arrays_lie_at_pages_and_are_not_copied(student: Path, tmp_path: Path):
    _, arrays = pack.open_packed(packed(student, tmp_path))
    for array in arrays.values():
        assert array.ctypes.data % pack.ALIGNMENT == 0
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_arrays_that_are_not_shared_are_the_same(student: Path, tmp_path: Path):
    place = packed(student, tmp_path)
    _, mapped = pack.open_packed(place)
    _, own = pack.open_packed(place, share=False)
    assert own.keys() == mapped.keys()
    for name, array in own.items():
        np.testing.assert_array_equal(array, mapped[name])
        assert array.ctypes.data % pack.ALIGNMENT == 0
        assert not array.flags.writeable


def test_where_the_system_has_no_large_pages_files_are_mapped(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = packed(student, tmp_path)
    switch = tmp_path / "enabled"
    monkeypatch.setattr(pages, "SWITCH", switch)
    assert not pages.large_pages()
    switch.write_text("always [madvise] never\n")
    assert pages.large_pages() == hasattr(mmap, "MADV_HUGEPAGE")
    switch.write_text("always madvise [never]\n")
    assert not pages.large_pages()
    _, arrays = pack.open_packed(place, share=False)
    assert all(isinstance(array.base, np.memmap) for array in arrays.values())


def python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


PACK = """
import sys, time
from pathlib import Path
from mar.engine import Engine, pack
folder, cache, start = sys.argv[1:]
inner = pack.write_packed
def later(*arguments):
    while time.time() < float(start):
        time.sleep(0.001)
    inner(*arguments)
pack.write_packed = later
engine = Engine.from_pretrained(Path(folder), cache=Path(cache), threads=1)
print(engine.prefill(engine.new_state(), [1, 2, 3]).tolist())
"""


def test_two_processes_that_pack_at_once_leave_one_good_file(student: Path, tmp_path: Path):
    import time

    both = [python(PACK, str(student), str(tmp_path), str(time.time() + 2.0)) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    (place,) = tmp_path.iterdir()
    pack.open_packed(place)


def test_a_killed_writer_leaves_the_place_free(student: Path, tmp_path: Path):
    code = "import os; os.fsync = lambda _: os._exit(9)\n" + PACK
    process = python(code, str(student), str(tmp_path), "0")
    assert process.wait(timeout=60) == 9
    assert not list(tmp_path.glob("*.marpack"))
    packed(student, tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing(student: Path, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written into \S+ \(File too large\); make room or name another"):
            packed(student, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_named(student: Path, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"cannot be written into \S+file \(.*\); make room or name another folder with"):
        packed(student, tmp_path / "file")
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="Permission denied"):
            packed(student, tmp_path)
        tmp_path.chmod(0o700)


def test_what_is_no_mar_folder(copied: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give a folder that mar wrote"):
        packed(copied / "nothing", copied)
    (copied / "model.safetensors").rename(copied / "away")
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        packed(copied, copied)
    (copied / "away").rename(copied / "model.safetensors")
    for content, message in (
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"model_type": "llama"}', "holds a 'llama' model"),
    ):
        (copied / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            packed(copied, copied)


NO_ONE = "no such key"
"""Stands for a key that is missing."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "knows silu only"),
        ({"bc_norm": "L2"}, "bc_norm is 'L2'"),
        ({"input_gain": "one-minus-decay"}, "input_gain is 'one-minus-decay'"),
        ({"rotary_base": True}, "rotary_base is True"),
        ({"window": False}, "window is False"),
        ({"window": None}, "window is None"),
        ({"window": 1}, "window is 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be an integer from 1"),
        ({"num_heads": -4}, "num_heads is -4"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"vocab_size": 2**70}, "vocab_size is 1180591620717411303424"),
        ({"state_size": 6.0}, "state_size is 6.0"),
        ({"conv_kernel": NO_ONE}, "conv_kernel is None"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"num_hidden_layers": 3}, r"layers.2.*is missing and not .*do not belong together"),
        ({"num_hidden_layers": 1}, r"no place for model.layers.1"),
        ({"hidden_size": 16}, r"is \(\d+, 32\) and not \(\d+, 16\).*do not belong together"),
        ({"vocab_size": 95}, r"embed_tokens.weight is \(96, 32\) and not \(95, 32\)"),
        ({"head_dim": 4, "num_heads": 8}, "do not belong together"),
        ({"tie_word_embeddings": True}, "no place for lm_head.weight"),
        ({"mlp_bias": True}, "gate_proj.bias is missing"),
        ({"decay_bias": False}, "no place for model.layers.0.mixer.decay_bias"),
        ({"neurons": []}, r"no place for model\.layers\.0\.m.*_neuron\.a"),
        ({"neurons": {"in_proj": {}}}, r"no place for model\.layers\.0\.mlp\.down_neuron\.a"),
        ({"neurons": [1]}, r"neurons is \[1\]; it must map"),
        ({"neurons": {"attention": {}}}, "it must map some of in_proj"),
        ({"neurons": {"in_proj": 4}}, "it must map some of in_proj"),
        ({"neurons": {"out_proj": {}}}, "out_neuron.a is missing"),
        ({"neurons": {"in_proj": {"threshold": "scalar"}}}, r"in_neuron.a is \(32,\) and not \(1,\)"),
        ({"neurons": {"in_proj": {"kind": "ternary"}}}, "in_proj neuron is 'ternary' with tau 1.0; the engine runs"),
        ({"neurons": {"in_proj": {"kind": "spiky"}}}, "'spiky'"),
        ({"neurons": {"in_proj": {"tau": 2.0}}}, "tau 2.0"),
        ({"neurons": {"in_proj": {"time_steps": 128}}}, "time_steps is 128; it must be an integer from 1 to 127"),
        ({"neurons": {"in_proj": {"time_steps": 0}}}, "time_steps is 0"),
        ({"neurons": {"in_proj": {"time_steps": "4"}}}, "time_steps is '4'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_the_engine_cannot_run(copied: Path, changes: dict[str, Any], message: str):
    config = json.loads((copied / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not NO_ONE}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        packed(copied, copied / "cache")
    assert "\n" not in str(caught.value)
    assert not (copied / "cache").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight has NaN or infinite elements"),
        (lambda t: t["model.layers.0.mixer.D"].fill_(float("inf")), "mixer.D has NaN or infinite elements"),
        (lambda t: t["model.layers.1.mixer.in_neuron.a"].fill_(-100.0), "in_neuron.a has elements beyond ±80"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(3,\) and not \(32,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).double()}), "is F64 and not F32, F16 or BF16"),
        (lambda t: t.update({"other": torch.ones(3)}), "no place for other"),
    ],
    ids=["nan", "infinite", "threshold", "missing", "shape", "fp64", "more"],
)
def test_weights_that_the_engine_cannot_run(copied: Path, change: Any, message: str):
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        packed(copied, copied / "cache")


def test_truncated_weights(copied: Path):
    whole = (copied / "model.safetensors").read_bytes()
    for length in (0, 3, 8, 100, 2000, len(whole) - 1):
        (copied / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
            packed(copied, copied / "cache")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size(copied: Path, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(copied / "model.safetensors").items()}
    save_file(tensors, copied / "model.safetensors")
    _, weights, _ = pack.read_folder(copied)
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name], tensor.float().numpy())


@pytest.mark.parametrize(("precision", "head"), [("int2", None), ("int8", "q8"), ("", None)])
def test_unknown_precisions(precision: str, head: str | None):
    with pytest.raises(ValueError, match="use one of fp32, bf16, int8, int4"):
        PackSettings(precision, head)
