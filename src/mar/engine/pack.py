"""Weights as the engine reads them: quantised, thresholds folded in, input-major, in one memory-mapped file.

Does: read a MAR folder without torch, pack it, keep the packed file in the user's cache. Does not: run anything.

A packed file is made once for a digest of the folder's config and weights, written beside its place and moved there
when it is whole, and checked against its own digest whenever it is opened: all of it, settings included.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from mar.compact import (
    CompactWeights,
    DamagedWeights,
    expand,
    filled,
    quantise,
    row_multipliers,
    thresholds,
    to_float,
)
from mar.engine.layout import PANEL, SLICE, alternate, pack_codes, pack_linear, pack_stream
from mar.engine.pages import large_pages, read_into_large_pages
from mar.weights import damaged_files, weight_files

PRECISIONS = ("fp32", "bf16", "int8", "int4")
TWO_STEP = "int4+int8"
"""A head whose single tokens take all words in int4, then the likeliest in int8 (docs/engine.md)."""

HEADS = (*PRECISIONS, TWO_STEP)
MAGIC = b"MARPACKA"
START = len(MAGIC) + hashlib.sha256().digest_size
"""Where what the digest covers starts: the header's length in 8 bytes, the header, the arrays."""

ALIGNMENT = 4096

GIVE_A_FOLDER = "give a folder that mar wrote (LLaMA teachers run on torch)"

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_heads", "head_dim")
SIZES += ("state_size", "conv_kernel")
SITES = ("in_proj", "out_proj", "gate_up", "down_proj")
NEURON = {"kind": "atmn", "time_steps": 4, "tau": 1.0, "threshold": "channel", "precharge": 0.0}
"""What a neuron is where its settings do not say, as in mar.config.NeuronConfig, which would bring torch along."""

Array = NDArray[Any]


@dataclass(frozen=True)
class PackSettings:
    """How a model is packed.

    precision: of the decoder's linears. head: of embedding and head, one of HEADS; None is the linears' precision, in
    two steps where that is int8. neurons: whether spiking sites keep their neurons; without, the same weights run dense
    (what spikes are compared with). panel: slices of a panel at most (`layout.PANEL`).
    """

    precision: str = "int8"
    head: str | None = None
    neurons: bool = True
    panel: int = PANEL

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("head", self.kind_of_head, HEADS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}.")

    @property
    def kind_of_head(self) -> str:
        """One of HEADS."""
        return self.head or _in_two_steps(self.precision)


def _in_two_steps(precision: str) -> str:
    """What a head of this precision is, unless one asks for it."""
    return TWO_STEP if precision == "int8" else precision


def _bulk_precision(head: str) -> str:
    """The precision that a head has for many tokens."""
    return "int8" if head == TWO_STEP else head


def pack_settings(
    folder: Path, precision: str | None, head: str | None, neurons: bool, panel: int = PANEL
) -> PackSettings:
    """Precision None stands for what a compact folder holds, else for int8; head None, where the precision is what a
    compact folder holds, for the folder's own head, int8 in two steps: rounding it to the linears' int4 costs far more
    than they do."""
    file = _files(folder)[0]
    compact = _config(file, file.read_bytes()).get("compact")
    stored: dict[str, str] = compact if isinstance(compact, dict) else {}
    precision = precision or stored.get("precision", "int8")
    if head is None and "head" in stored and precision == stored.get("precision"):
        head = _in_two_steps(stored["head"])
    return PackSettings(precision, head, neurons, panel)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Array], str]:
    """Config, weights in fp32 and digest of a MAR folder. Raises FileNotFoundError or ValueError in one sentence."""
    files = _files(folder)
    raw_config, *raw_weights = (file.read_bytes() for file in files)
    config = _config(files[0], raw_config)
    if config.get("model_type") != "mar":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, not a MAR one; convert it first.")
    try:
        if config.get("compact") is not None:
            weights = expand(config, *raw_weights)
        else:
            weights = {name: to_float(name, tensor) for raw in raw_weights for name, tensor in deserialize(raw)}
    except (SafetensorError, DamagedWeights) as error:
        names = damaged_files(files[1:])
        raise ValueError(f"{folder / names} is truncated or damaged ({error}); restore it.") from error
    return config, weights, _digest(raw_config, *raw_weights)


def _config(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it.") from error


def folder_digest(folder: Path) -> str:
    """SHA-256 over config and weights, as `mar.folder.digest`. Raises FileNotFoundError."""
    sha = hashlib.sha256()
    for path in _files(folder):
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: sha)
    return sha.hexdigest()


def _files(folder: Path) -> list[Path]:
    if not (config := folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no {config.name}; {GIVE_A_FOLDER}.")
    return [config, *weight_files(folder, GIVE_A_FOLDER)]


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def engine_settings(config: dict[str, Any], settings: PackSettings) -> dict[str, Any]:
    """What the native model is told beside its arrays. Raises ValueError for what the engine cannot run."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; the engine knows silu only.")
    found: dict[str, Any] = {name: _integer(config, name) for name in SIZES}
    eps = config.get("rms_norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise ValueError(f"rms_norm_eps is {eps!r}; it must be a number from 0 to 1.")
    base = config.get("rotary_base", 1e4)
    if type(base) not in (int, float) or not 0 < base < sys.float_info.max:
        raise ValueError(f"rotary_base is {base!r}; it must be a number above 0.")
    if found["state_size"] % 2 and config.get("window", 0):
        raise ValueError(f"state_size is {found['state_size']}; a window turns pairs of channels, so it must be even.")
    least = max(2, found["conv_kernel"])  # as in MarConfig
    if (window := _integer({"window": 0} | config, "window", 1 << 20, least=0)) and window < least:
        raise ValueError(f"window is {window}; use 0 for none, or at least {least} (conv_kernel, and never 1).")
    gain, norm = config.get("input_gain", "one_minus_decay"), config.get("bc_norm", "l2")
    for name, value, known in (("input_gain", gain, ("none", "one_minus_decay")), ("bc_norm", norm, ("none", "l2"))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, known))}.")
    found |= {
        "rms_norm_eps": float(eps),
        "gain": int(gain == "one_minus_decay"),
        "window": window,
        "rotary_base": float(base),
        "unit": int(norm == "l2"),
        "precision": settings.precision,
        "head_precision": _bulk_precision(settings.kind_of_head),
        "panel": settings.panel,
    }
    for site, neuron in _neurons(config, settings).items():
        steps = neuron["time_steps"]
        found[f"{site}.encoder"] = (0 if neuron["kind"] == "binary" else -steps, steps, float(neuron["precharge"]))
    return found


def _integer(values: dict[str, Any], name: str, most: int = 1 << 28, least: int = 1) -> int:
    value = values.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; it must be an integer from {least} to {most}.")
    return value


def _neurons(config: dict[str, Any], settings: PackSettings) -> dict[str, dict[str, Any]]:
    """All settings of the neurons that are kept, by site. Raises ValueError for what the engine cannot run."""
    given = (config.get("neurons") or {}) if settings.neurons else {}
    if not isinstance(given, dict) or not all(site in SITES and isinstance(given[site], dict) for site in given):
        raise ValueError(f"neurons is {given!r}; it must map some of {', '.join(SITES)} to their neurons' settings.")
    neurons = {site: NEURON | neuron for site, neuron in given.items()}
    for site, neuron in neurons.items():
        _integer(neuron, "time_steps", 127)
        if type(neuron["precharge"]) not in (int, float) or not 0 <= neuron["precharge"] <= 0.5:
            raise ValueError(f"precharge of {site} is {neuron['precharge']!r}; it must be a number from 0 to 0.5.")
        if neuron["kind"] not in ("atmn", "binary") or neuron["tau"] != 1:
            raise ValueError(
                f"The {site} neuron is {neuron['kind']!r} with tau {neuron['tau']!r}; the engine runs neurons whose "
                "spikes collapse into one code: atmn or binary at tau 1."
            )
    return neurons


def pack(config: dict[str, Any], weights: dict[str, Array], settings: PackSettings) -> dict[str, Array]:
    """Every array of the native model, as flat bytes by name. Raises ValueError where config and weights disagree."""
    arrays: dict[str, Array] = {}
    neurons = _neurons(config, settings)
    compact = weights if isinstance(weights, CompactWeights) else CompactWeights()
    # A decoder's stored codes have thresholds folded in, so they are of no use where neurons are left out.
    usable = bool(neurons) or not config.get("neurons")
    vocab, hidden, ffn, layers, heads, width, state, taps = (config[name] for name in SIZES)
    inner, channels, left = heads * width, heads * (width + 2 * state), set(weights)
    wide = channels + inner

    def take(name: str, *shape: int) -> Array:
        left.discard(name)
        found = weights[name].shape if name in weights else "missing"
        if found != shape:
            raise ValueError(f"{name} is {found} and not {shape}; config and weights do not belong together.")
        return weights[name]

    def linear(name: str, weight: Array, precision: str, *sources: str, bias: Array | None = None) -> None:
        """Pack a weight, or the very codes of its `sources` where a compact folder holds them in this precision."""
        stored = [compact.quantised[source] for source in sources if source in compact.quantised]
        exact = stored and stored[0].precision == precision and (usable or name == "head")
        packed = pack_codes(*stored, panel=settings.panel) if exact else pack_linear(weight, precision, settings.panel)
        arrays.update({f"{name}.{kind}": array for kind, array in packed.items()})
        if bias is not None:
            arrays[f"{name}.bias"] = filled(bias, SLICE * (2 if precision == "int4" else 1))

    def fold(at: str, site: str, module: str, *folded: Array) -> list[Array]:
        """The site's thresholds into its linears' inputs; what does not fit a common scale becomes a multiplier."""
        if site not in neurons:
            if not settings.neurons:  # else a threshold that the config has no neuron for is an error, as in torch
                left.discard(f"{module}.a")
            return list(folded)
        inputs = folded[0].shape[1]
        a = take(f"{module}.a", 1 if neurons[site]["threshold"] == "scalar" else inputs)
        v = thresholds(f"{module}.a", a, inputs)
        arrays[f"{at}{site}.threshold"] = v
        if settings.precision in ("int8", "int4"):
            multipliers = compact.multipliers.get(module)
            if multipliers is None:
                multipliers = row_multipliers(v, neurons[site]["time_steps"])
            arrays[f"{at}{site}.multiplier"] = multipliers
            v = v / multipliers
        return [weight * v for weight in folded]

    for index in range(layers):
        at, source = f"layers.{index}.", f"model.layers.{index}."
        mixer, mlp = f"{source}mixer.", f"{source}mlp."
        (in_proj,) = fold(at, "in_proj", f"{mixer}in_neuron", take(f"{mixer}in_proj.weight", wide + heads, hidden))
        linear(f"{at}in_proj", in_proj[:wide], settings.precision, f"{mixer}in_proj.weight")
        arrays[f"{at}decay_weight"] = in_proj[wide:]
        biased = config.get("decay_bias", True)
        arrays[f"{at}decay_bias"] = take(f"{mixer}decay_bias", heads) if biased else np.zeros(heads, np.float32)
        arrays[f"{at}conv_weight"] = take(f"{mixer}conv_weight", channels, taps).T
        arrays[f"{at}conv_bias"] = take(f"{mixer}conv_bias", channels)
        arrays[f"{at}gate_bias"] = take(f"{mixer}z_bias", inner)
        arrays[f"{at}skip"] = take(f"{mixer}D", heads)
        (out_proj,) = fold(at, "out_proj", f"{mixer}out_neuron", take(f"{mixer}out_proj.weight", hidden, inner))
        linear(f"{at}out_proj", out_proj, settings.precision, f"{mixer}out_proj.weight")
        halves = [f"{mlp}{name}_proj.weight" for name in ("gate", "up")]
        gate, up = fold(at, "gate_up", f"{mlp}in_neuron", *(take(name, ffn, hidden) for name in halves))
        (down,) = fold(at, "down_proj", f"{mlp}down_neuron", take(f"{mlp}down_proj.weight", hidden, ffn))
        both = bias = None
        if config.get("mlp_bias", False):
            both = alternate(take(f"{mlp}gate_proj.bias", ffn), take(f"{mlp}up_proj.bias", ffn))
            bias = take(f"{mlp}down_proj.bias", hidden)
        linear(f"{at}gate_up", alternate(gate, up), settings.precision, *halves, bias=both)
        linear(f"{at}down_proj", down, settings.precision, f"{mlp}down_proj.weight", bias=bias)
        arrays[f"{at}mixer_norm"] = take(f"{source}input_layernorm.weight", hidden)
        arrays[f"{at}ffn_norm"] = take(f"{source}post_attention_layernorm.weight", hidden)
    arrays["norm"] = take("model.norm.weight", hidden)
    embedding = take("model.embed_tokens.weight", vocab, hidden)
    tied = config.get("tie_word_embeddings", False)
    head = embedding if tied else take("lm_head.weight", vocab, hidden)
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if settings.kind_of_head == TWO_STEP:
        words = compact.quantised.get(source)
        if words is None or words.precision != "int8":
            words = quantise(head, "int8")
        rough = quantise(words.values(), "int4")
        parts = {"": pack_codes(words, panel=settings.panel), "rough.": pack_stream(rough.codes, rough.scales)}
        arrays |= {f"head.{step}{kind}": array for step, part in parts.items() for kind, array in part.items()}
        arrays["head.words"] = words.codes
    else:
        linear("head", head, settings.kind_of_head, source)
    if not tied and not np.array_equal(head, embedding):
        arrays["embedding"] = embedding
    if left:
        raise ValueError(f"The config has no place for {min(left)}; config and weights do not belong together.")
    return {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}


def cache_folder() -> Path:
    """Where packed files are kept: in $MAR_CACHE, else in `mar` in the user's cache folder (as mar.teachers has it)."""
    if own := os.environ.get("MAR_CACHE"):
        return Path(own).expanduser() / "packed"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mar" / "packed"


def packed_file(folder: Path, settings: PackSettings, cache: Path | None = None) -> Path:
    """The packed file of a model folder, made now if there is none or if the one there is damaged."""
    settings = replace(settings, head=settings.kind_of_head)  # one file for what comes to the same
    key = json.dumps({"format": MAGIC.decode(), **asdict(settings)}, sort_keys=True)

    def place_of(digest: str) -> Path:
        return (cache or cache_folder()) / f"{digest[:16]}-{_digest(key.encode())[:12]}.marpack"

    place = place_of(folder_digest(folder))
    if place.is_file():
        try:
            open_packed(place)
            return place
        except ValueError:
            pass  # packed again below, over the damaged one
    config, weights, digest = read_folder(folder)
    place = place_of(digest)
    native = engine_settings(config, settings)
    write_packed(place, native, pack(config, weights, settings), {"source": digest, "packed_as": asdict(settings)})
    return place


def write_packed(place: Path, settings: dict[str, Any], arrays: dict[str, Array], about: dict[str, Any]) -> None:
    """Write one file, whole or not at all. Two processes that pack the same model leave one good file.

    Raises OSError, in one sentence, where the folder cannot be written or is full.
    """
    offset, entries = 0, {}
    for name, array in arrays.items():
        entries[name] = (offset, array.nbytes)
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"settings": settings, "arrays": entries, **about}).encode()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=place.stem, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + bytes(START - len(MAGIC)))
                sha = hashlib.sha256()
                for part in (len(header).to_bytes(8, "little") + header, *(array.data for array in arrays.values())):
                    for piece in (part, bytes(-(file.tell() + len(part)) % ALIGNMENT)):
                        sha.update(piece)
                        file.write(piece)
                file.seek(len(MAGIC))
                file.write(sha.digest())
                file.flush()
                os.fsync(file.fileno())
            # Other processes map it: cut short in place it would end them with a bus error.
            os.chmod(name, 0o400)
            os.replace(name, place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(
            f"The packed model cannot be written into {place.parent} ({error.strerror or error}); make room or name "
            "another folder with MAR_CACHE."
        ) from error


def open_packed(place: Path, share: bool = True) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of a packed file, mapped or read into memory of their own. Raises ValueError if it is damaged.

    share: map the file, whose pages other processes share. Else read it into large pages where the system has them:
    a page of 4 KB is looked up each time that its weights are read.
    """

    def damaged(problem: str) -> ValueError:
        return ValueError(f"{place} is damaged ({problem}); remove it, and it is packed again.")

    with open(place, "rb") as file:
        begin = file.read(START + 8)
    if len(begin) < START + 8 or not begin.startswith(MAGIC):
        raise damaged("it does not start as a packed model does")
    whole = np.memmap(place, np.uint8, "r") if share or not large_pages() else read_into_large_pages(place)
    if hashlib.sha256(whole[START:].data).digest() != begin[len(MAGIC) : START]:
        raise damaged("its contents do not match its digest")
    end = START + 8 + int.from_bytes(begin[START:], "little")
    try:
        header = json.loads(whole[START + 8 : end].tobytes())
        entries = {str(name): (int(at), int(count)) for name, (at, count) in header["arrays"].items()}
        settings = dict(header["settings"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged(f"its header cannot be read: {error}") from error
    start = -(-end // ALIGNMENT) * ALIGNMENT
    for name, (at, count) in entries.items():
        if at < 0 or count < 0 or start + at + count > len(whole):
            raise damaged(f"{name!r} lies beyond its end")
    header["settings"] = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return header, {name: whole[start + at : start + at + count] for name, (at, count) in entries.items()}
