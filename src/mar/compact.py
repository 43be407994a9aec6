"""Compact weights: linears, embedding and head as small integers with scales, by the names of a Hugging Face folder.

Does: quantise, name the tensors of a compact folder, read them back as floats and as the very codes that were stored.
numpy only, for the engine and the transformers classes share it. Does not: lay weights out for the engine
(mar.engine.pack), or write folders (mar.steps).

A linear whose inputs are spikes takes codes, so what is quantised is W diag(V / m): its site's thresholds V are folded
in, and the site's whole multipliers m are taken out. int8 has one scale an output, a bf16. int4 has one scale for GROUP
inputs of an output, of 8 bits: a sign, and 127 steps of an eighth of an octave up to the largest scale of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from mar.rounding import (
    GROUP,
    STEPS,
    filled,
    from_bf16,
    quantise_calibrated,
    quantise_int4,
    quantise_int8,
    scale_size,
    to_bf16,
)

Array = NDArray[Any]

PRECISIONS = ("int8", "int4")
HEADS = ("int8", "int4", "bf16")
HEAD_PLACE = "model.norm"
"""The module whose output the head multiplies."""

EXACT = (".D", ".decay_bias")
"""Parameters that stay fp32: a decay in bf16 forgets at the wrong rate."""

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8, "I32": np.int32}


class DamagedWeights(ValueError):
    """Tensors that make no model."""


@dataclass(frozen=True)
class Quantised:
    """A weight (outputs, inputs) as `codes` of that shape (int8) times `scales`.

    scales: fp32 (outputs, 1) in int8, bits of bf16 (outputs, groups) in int4.
    """

    precision: str
    codes: Array
    scales: Array

    def values(self) -> Array:
        """What the codes stand for, fp32."""
        if self.precision == "int8":
            return self.codes * self.scales
        return self.codes * np.repeat(from_bf16(self.scales), GROUP, 1)[:, : self.codes.shape[1]]


class CompactWeights(dict[str, Array]):
    """A compact folder's weights in fp32 by their usual names, as a model without compression has them.

    quantised: by the same names, what is stored of linears, embedding and head: of in_proj all but its decay rows,
    folded where the site has a neuron. multipliers: int8 (inputs,) of each site, by its neuron's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quantised: dict[str, Quantised] = {}
        self.multipliers: dict[str, Array] = {}


class _Linear(NamedTuple):
    """A decoder's linear: its name, input width, neuron's name ("" without), that one's steps, rows of decay logits.

    place: where its neuron is or would be.
    """

    name: str
    inputs: int
    neuron: str
    steps: int
    decays: int
    place: str


def _linears(config: Mapping[str, Any]) -> Iterator[_Linear]:
    hidden, inner, wide = config["hidden_size"], config["num_heads"] * config["head_dim"], config["intermediate_size"]
    sites = (
        ("in_proj", "mixer.in_neuron", hidden, ("mixer.in_proj",)),
        ("out_proj", "mixer.out_neuron", inner, ("mixer.out_proj",)),
        ("gate_up", "mlp.in_neuron", hidden, ("mlp.gate_proj", "mlp.up_proj")),
        ("down_proj", "mlp.down_neuron", wide, ("mlp.down_proj",)),
    )
    neurons = config.get("neurons") or {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for site, neuron, inputs, names in sites:
            steps = int(neurons[site].get("time_steps", 4)) if site in neurons else 0
            for name in names:
                decays = config["num_heads"] if site == "in_proj" else 0
                yield _Linear(at + name, inputs, at + neuron if steps else "", steps, decays, at + neuron)


def compress(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    precision: str,
    head: str,
    moments: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The tensors of a compact folder from fp32 weights; uint16 stands for bits of bf16.

    moments: second moments (inputs, inputs) of what linears multiply, by the name of the neuron before them (or of its
    empty place), and of what the head does, by `HEAD_PLACE`, to calibrate their codes on (mar.rounding); without,
    every weight goes to the nearest code.
    Raises ValueError for an unknown precision and for thresholds out of range.
    """
    for name, value, known in (("precision", precision, PRECISIONS), ("head", head, HEADS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}.")
    tensors, left = {}, dict(weights)
    for linear in _linears(config):
        weight = left.pop(f"{linear.name}.weight")
        rows = len(weight) - linear.decays
        if linear.decays:
            tensors[f"{linear.name}.decay"] = to_bf16(weight[rows:])
        folded, moment = weight[:rows], None if moments is None else moments[linear.place]
        if linear.neuron:
            # In half the bytes, and what is folded is what is stored, so codes and weights stay in step.
            a = tensors[f"{linear.neuron}.a"] = weights[f"{linear.neuron}.a"].astype(np.float16)
            left.pop(f"{linear.neuron}.a", None)
            v = thresholds(f"{linear.neuron}.a", a.astype(np.float32), linear.inputs)
            tensors[f"{linear.neuron}.multipliers"] = m = row_multipliers(v, linear.steps)
            folded = folded * (v / m)
            moment = None if moment is None else moment / (v / m) / (v / m)[:, None]
        tensors |= _stored(linear.name, quantise(folded, precision, short=True, moment=moment))
    fit = {"lm_head" if "lm_head.weight" in left else "model.embed_tokens": moments[HEAD_PLACE]} if moments else {}
    for name in ("model.embed_tokens", "lm_head"):
        if head != "bf16" and f"{name}.weight" in left:
            tensors |= _stored(name, quantise(left.pop(f"{name}.weight"), head, short=True, moment=fit.get(name)))
    return tensors | {name: value if name.endswith(EXACT) else to_bf16(value) for name, value in left.items()}


def _stored(name: str, weight: Quantised) -> dict[str, Array]:
    """A quantised weight as tensors; int4 has two codes + 8 in a byte, the even input's in the lower half."""
    if weight.precision == "int8":
        return {f"{name}.codes": weight.codes, f"{name}.scales": to_bf16(weight.scales)}
    shifted = (filled(weight.codes.T, 2).T + 8).astype(np.uint8)
    sizes = scale_size(weight.scales)
    base = max(int(sizes.max()) - STEPS, 0)
    scales = np.where(sizes > 0, weight.scales >> 8 & 0x80 | sizes - base, 0).astype(np.uint8)
    return {
        f"{name}.codes": shifted[:, ::2] | shifted[:, 1::2] << 4,
        f"{name}.scales": scales,
        f"{name}.base": np.array([base], np.int32),
    }


def expand(config: Mapping[str, Any], *files: bytes) -> CompactWeights:
    """The weights in the bytes of a compact folder's weight files.

    Raises SafetensorError where it is cut off, DamagedWeights where it holds something else than the config says.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _expand(config, {name: tensor for raw in files for name, tensor in deserialize(raw)})
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedWeights(f"its config describes no compact model: {error}") from error


def _expand(config: Mapping[str, Any], left: dict[str, dict[str, Any]]) -> CompactWeights:
    mark = config["compact"]
    precision, head = (mark.get(key) if isinstance(mark, Mapping) else None for key in ("precision", "head"))
    if precision not in PRECISIONS or head not in HEADS:
        raise DamagedWeights(f"its config calls it compact with {mark!r}, which this version does not know")
    found = CompactWeights()

    def take(name: str, kind: str, *shape: int | None) -> Array:
        tensor = left.pop(name, {"dtype": "missing", "shape": []})
        actual = tensor["shape"]
        fits = len(actual) == len(shape) and all(size in (None, real) for size, real in zip(shape, actual, strict=True))
        if tensor["dtype"] != kind or not fits:
            raise DamagedWeights(f"{name} is {tensor['dtype']} {tuple(actual)} and not {kind} {shape}")
        return np.frombuffer(tensor["data"], TYPES[kind]).reshape(actual)

    def load(name: str, precision: str, inputs: int) -> Quantised:
        if precision == "int8":
            codes = take(f"{name}.codes", "I8", None, inputs)
            return Quantised("int8", codes, from_bf16(take(f"{name}.scales", "BF16", len(codes), 1)))
        pairs = take(f"{name}.codes", "U8", None, -(-inputs // 2))
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1)[:, :inputs].astype(np.int8) - np.int8(8)
        sizes = take(f"{name}.scales", "U8", len(pairs), -(-inputs // GROUP)).astype(np.int32)
        base = int(take(f"{name}.base", "I32", 1)[0])
        if not 0 <= base <= 0x7F0 - STEPS:
            raise DamagedWeights(f"{name}.base is {base}")
        bits = np.where(sizes & STEPS, (sizes & 0x80) << 8 | (sizes & STEPS) + base << 4, 0)
        return Quantised("int4", codes, bits.astype(np.uint16))

    for linear in _linears(config):
        kept = found.quantised[f"{linear.name}.weight"] = load(linear.name, precision, linear.inputs)
        values = kept.values()
        if name := linear.neuron:
            if name not in found.multipliers:
                m = found.multipliers[name] = take(f"{name}.multipliers", "I8", linear.inputs)
                if m.min() < 1 or int(m.max()) * linear.steps > 127:
                    raise DamagedWeights(f"{name}.multipliers takes codes beyond 8 bits")
                found[f"{name}.a"] = a = take(f"{name}.a", "F16", None).astype(np.float32)
                if a.shape != (1,) and a.shape != (linear.inputs,):
                    raise DamagedWeights(f"{name}.a has {len(a)} elements for {linear.inputs} inputs")
            values *= found.multipliers[name] / thresholds(f"{name}.a", found[f"{name}.a"], linear.inputs)
        if linear.decays:
            decays = from_bf16(take(f"{linear.name}.decay", "BF16", linear.decays, linear.inputs))
            values = np.concatenate([values, decays])
        found[f"{linear.name}.weight"] = values
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.codes" in left:
            kept = found.quantised[f"{name}.weight"] = load(name, head, config["hidden_size"])
            found[f"{name}.weight"] = kept.values()
    for name, values in found.items():
        _check_finite(name, values)
    found |= {name: to_float(name, tensor) for name, tensor in left.items()}
    return found


def to_float(name: str, tensor: dict[str, Any]) -> Array:
    """A tensor of `safetensors.deserialize` in fp32. Raises DamagedWeights unless it holds floats that are finite."""
    if tensor["dtype"] not in ("F32", "F16", "BF16"):
        raise DamagedWeights(f"{name} is {tensor['dtype']} and not F32, F16 or BF16")
    values = np.frombuffer(tensor["data"], TYPES[tensor["dtype"]]).reshape(tensor["shape"])
    values = from_bf16(values) if tensor["dtype"] == "BF16" else values.astype(np.float32, copy=False)
    _check_finite(name, values)
    return values


def _check_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise DamagedWeights(f"{name} has NaN or infinite elements")


def thresholds(name: str, a: Array, inputs: int) -> Array:
    """V = exp(a) of each input, fp32. Raises ValueError where that is no fp32 number."""
    if not np.abs(a).max() <= 80:
        raise ValueError(f"{name} has elements beyond ±80, no fp32 threshold; restore it or refine again.")
    return np.broadcast_to(np.exp(a), (inputs,))


def row_multipliers(v: Array, steps: int) -> Array:
    """Whole factors (inputs,) int8 that codes in [-steps, steps] take over from their folded thresholds v.

    A few channels have thresholds tens of times the usual one. Folded, their rows would set every output's scale and
    leave few levels to all others. A factor m stores the row as W V / m, and the code goes in as m times itself, which
    must fit 8 bits. A row below the unit keeps m = 1.
    """
    most = 127 // steps
    unit = float(v.max()) / most
    return np.ceil(v / np.float32(unit) - 1e-4).clip(1, most).astype(np.int8)


def quantise(weight: Array, precision: str, short: bool = False, moment: Array | None = None) -> Quantised:
    """A weight (outputs, inputs), fp32, in int8 or int4; short: with scales that fit 16 and 8 bits.

    moment: (inputs, inputs), the second moment of its inputs, to calibrate codes and (then short) scales on.
    """
    rows = np.ascontiguousarray(weight.T)
    if moment is not None:
        codes, scales = quantise_calibrated(rows, moment, precision)
    else:
        codes, scales = quantise_int8(rows, short) if precision == "int8" else quantise_int4(rows, short)
    return Quantised(precision, np.ascontiguousarray(codes.T), np.ascontiguousarray(np.atleast_2d(scales).T))
