"""Where the energy model's curves cross: LLaMA, its dense MAR student and its spiking student, at two published shapes.

Does: derive every figure from the census (no model is run, so all are modelled). Does not: measure spike rates; the two
used here are arguments and labelled as assumed.

    python benchmarks/energy_crossings.py [--json] [--spikes 0.64] [--nonzero 0.36] [--steps 4] [--context 512]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from transformers import LlamaConfig

from mar.census import census, parameters
from mar.config import MIXER_PRESETS, SITES, MarConfig, NeuronConfig, site_neurons
from mar.costs import TABLES, break_even, compare, cost, crossing
from mar.spikes import SiteRate

SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def student(teacher: LlamaConfig, preset: str, steps: int = 0) -> MarConfig:
    """The MAR of a LLaMA's shape: one mixer head per query head, state as wide as a head; spiking if steps > 0."""
    head = teacher.hidden_size // teacher.num_attention_heads
    return MarConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        intermediate_size=teacher.intermediate_size,
        num_hidden_layers=teacher.num_hidden_layers,
        num_heads=teacher.num_attention_heads,
        head_dim=head,
        state_size=head,
        tie_word_embeddings=teacher.tie_word_embeddings,
        neurons=site_neurons(NeuronConfig(time_steps=steps)) if steps else None,
        **MIXER_PRESETS[preset],
    )


def figures(teacher: LlamaConfig, rate: SiteRate, steps: int, context: float) -> dict[str, Any]:
    """All crossings and shares of one shape; lengths in tokens, energies in µJ per token."""
    dense, fast, spiking = student(teacher, "llamba"), student(teacher, "fast"), student(teacher, "llamba", steps)
    rates = dict.fromkeys(SITES, rate)

    def linears(spikes: float) -> float:
        assumed = dict.fromkeys(SITES, SiteRate(spikes, min(spikes, 1.0)))
        groups = cost(census(student(teacher, "llamba", 127), context, assumed)).by_group
        return groups["projections"] + groups["ffn"]

    def macs(group: str, averaging: Any):
        return lambda length: census(teacher, length, averaging=averaging).count("mac", group)

    def attention(averaging: Any):
        return lambda length: macs("scores", averaging)(length) + macs("projections", averaging)(length)

    def total(config: Any, averaging: Any, **price: Any):
        return lambda length: cost(census(config, length, averaging=averaging), **price).decoder

    groups = cost(census(dense, context)).by_group
    spiked = cost(census(spiking, context, rates)).by_group
    head = cost(census(dense, context)).head
    dense_linears = groups["projections"] + groups["ffn"]
    found: dict[str, Any] = {"parameters_llama": parameters(teacher), "parameters_mar": parameters(dense)}
    for averaging in ("decode", "prefill"):
        found[averaging] = {
            "scores_equal_projections": crossing(macs("scores", averaging), macs("projections", averaging)),
            "attention_equals_ffn": crossing(attention(averaging), macs("ffn", averaging)),
            "dense_student_equals_llama": {
                f"{name}, {preset}{', and traffic' if traffic else ''}": crossing(
                    total(config, averaging, table=name, traffic=traffic),
                    total(teacher, averaging, table=name, traffic=traffic),
                )
                for name in TABLES
                for preset, config in (("llamba", dense), ("fast", fast))
                for traffic in (False, True)
            },
        }
    return found | {
        "conv_and_scan_of_dense_ffn": groups["scan"] / groups["ffn"],
        "conv_and_scan_of_spiking_ffn": spiked["scan"] / spiked["ffn"],
        "break_even_spikes": {name: break_even(dense, name) for name in TABLES},
        "head_uj": {name: cost(census(dense, context), name).head for name in TABLES},
        "spikes_at_which_linears_equal_head": crossing(linears, lambda _: head, 0.0, 127.0),
        "spiking_of_dense_linears": linears(rate.spikes) / dense_linears,
        "spiking_of_dense_linears_with_head": (linears(rate.spikes) + head) / (dense_linears + head),
        "side_by_side": compare(
            {"LLaMA": (teacher, None), "dense MAR": (dense, None), "spiking MAR": (spiking, rates)}, context
        ),
    }


def main() -> None:
    """Print the figures of both shapes, as text or as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--spikes", type=float, default=0.64, help="assumed r·T at every site")
    parser.add_argument("--nonzero", type=float, default=0.36, help="assumed share of non-zero codes at every site")
    parser.add_argument("--steps", type=int, default=4, help="T of every neuron, for the neurons' own line")
    parser.add_argument("--context", type=float, default=512, help="tokens of context of the side-by-side table")
    options = parser.parse_args()
    rate = SiteRate(options.spikes, options.nonzero)
    found: dict[str, Any] = {"assumed": {**rate._asdict(), "steps": options.steps, "context": options.context}}
    found |= {
        name: figures(LlamaConfig(**shape), rate, options.steps, options.context) for name, shape in SHAPES.items()
    }
    print(json.dumps(found) if options.json else "\n".join(_lines(found)))


def _lines(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict) and "compute" in value:
        compute, moved = value["compute"], value["compute_and_memory"]
        return [
            f"{path} {value['model']}, {value['table']}: {compute['decoder_uj']:.1f} µJ compute, "
            f"{moved['decoder_uj']:.0f} µJ with traffic (decoder); {compute['with_head_uj']:.1f} and "
            f"{moved['with_head_uj']:.0f} µJ with head; {compute['neuron_uj']:.2f} µJ neurons; {compute['label']}"
        ]
    if isinstance(value, dict):
        return [line for key, part in value.items() for line in _lines(part, f"{path} {key}:".strip())]
    if isinstance(value, list):
        return [line for part in value for line in _lines(part, path)]
    return [f"{path} {value:.6g}" if isinstance(value, float) else f"{path} {value}"]


if __name__ == "__main__":
    main()
