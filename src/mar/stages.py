"""What each stage trains, on which loss: align, distill, spike_align, spike; each an Objective for mar.train.

Does: run teacher and student on a batch, hand losses to the loop's `backward`, return metrics that name their target.
Does not: loop, step or save training state. Layer-parallel stages call `backward` once a layer, so only one layer's
activations live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mar.layers import Batch, captured, last_hidden, llama_layers, mar_layers
from mar.losses import chunked_bidirectional_kl, feature_alignment, matrix_distance, relative_mse
from mar.model import MarForCausalLM
from mar.neurons import Neuron
from mar.objective import ParameterGroup

Backward = Callable[[Tensor], None]

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "mixers": lambda name: ".mixer." in name and not name.endswith(".a"),
    "mixers+norms": lambda name: (".mixer." in name or "norm" in name) and not name.endswith(".a"),
    "thresholds": lambda name: name.endswith(".a"),
    "layers": lambda name: ".layers." in name or name == "model.norm.weight",
    "all": lambda name: True,
}
"""Trained-parameter sets by name. `layers` is everything but embedding and head."""


def trained_groups(
    model: nn.Module, trained: str, threshold_lr_scale: float = 1.0, clip: Callable[[str], str] = lambda _: "all"
) -> list[ParameterGroup]:
    """The parameters of one set, freezing all others: matrices decay, vectors do not, thresholds have their own rate.

    The convolution's taps count as vectors, a few a channel: they mix no channels, and shrunk they fade all of x, B, C.
    Raises ValueError for an unknown set.
    """
    if trained not in TRAINABLE:
        raise ValueError(f"trained parameter set is {trained!r}; use one of {', '.join(map(repr, TRAINABLE))}.")
    found: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINABLE[trained](name))
        if parameter.requires_grad:
            kind = "matrices" if parameter.dim() > 1 and not name.endswith("conv_weight") else "vectors"
            if name.endswith((".a", "embed_tokens.weight", "lm_head.weight")):
                kind = "thresholds" if name.endswith(".a") else "embeddings"
            found.setdefault((kind, clip(name)), {})[name] = parameter
    return [
        ParameterGroup(
            name=kind if tag == "all" else f"{tag}.{kind}",
            parameters=parameters,
            lr_scale=threshold_lr_scale if kind == "thresholds" else 1.0,
            weight_decay=None if kind in ("matrices", "embeddings") else 0.0,
            clip=tag,
            muon=kind == "matrices",
        )
        for (kind, tag), parameters in found.items()
    ]


def layer_of(name: str) -> str:
    """`layer.7` for a parameter of decoder layer 7: layers that learn in parallel are clipped apart."""
    return f"layer.{name.split('.layers.')[1].split('.')[0]}" if ".layers." in name else "all"


@dataclass
class Align:
    """Each mixer reconstructs its attention's output from the teacher's input to that layer (MOHAWK ii, FFN frozen).

    Loss per layer: relative squared error (`relative_mse`). No student chain, no vocabulary.
    """

    student: MarForCausalLM
    teacher: PreTrainedModel
    name: str = "align"

    def parameter_groups(self) -> list[ParameterGroup]:
        """Mixers only, one clip group a layer."""
        return trained_groups(self.student, "mixers", clip=layer_of)

    def accumulate(self, batch: Batch, backward: Backward) -> dict[str, float]:
        """One backward call a layer; the metric is the mean relative squared error against the LLaMA's attention."""
        errors = []
        for layer, trace in zip(self.student.model.layers, llama_layers(self.teacher, batch), strict=True):
            block: Any = layer
            mixed, _ = block.mixer(block.input_layernorm(trace.hidden.float()), None, None, batch["document_ids"])
            loss = relative_mse(mixed, trace.mixed)
            backward(loss)
            errors.append(loss.detach())
        return {"relative_mse_to_llama": torch.stack(errors).mean().item()}


@dataclass
class Orient:
    """Each mixer's matrix learns the attention matrix (MOHAWK i): Frobenius distance per layer and head."""

    student: MarForCausalLM
    teacher: PreTrainedModel
    name: str = "orient"

    def parameter_groups(self) -> list[ParameterGroup]:
        """Mixers only, one clip group a layer."""
        return trained_groups(self.student, "mixers", clip=layer_of)

    def accumulate(self, batch: Batch, backward: Backward) -> dict[str, float]:
        """One backward call a layer; needs a teacher loaded with eager attention, which returns its matrices."""
        body: Any = self.teacher.model
        distances = []
        with captured([layer.self_attn for layer in body.layers]) as outputs:
            traces = list(llama_layers(self.teacher, batch))
        for layer, trace, (_, matrix) in zip(self.student.model.layers, traces, outputs, strict=True):
            if matrix is None:
                raise ValueError("orient needs attention matrices: load the teacher with attn_implementation='eager'.")
            block: Any = layer
            own = block.mixer.matrix(block.input_layernorm(trace.hidden.float()), batch["document_ids"])
            loss = matrix_distance(matrix.float(), own)
            backward(loss)
            distances.append(loss.detach())
        return {"matrix_distance_to_llama": torch.stack(distances).mean().item()}


@dataclass
class Distill:
    """End to end: the student's next-token distribution learns the teacher's (MOHAWK iii); no labels."""

    student: MarForCausalLM
    teacher: PreTrainedModel
    alpha: float = 1.0
    beta: float = 0.0
    trained: str = "layers"
    against: str = "llama"
    name: str = "distill"

    def parameter_groups(self) -> list[ParameterGroup]:
        """The set `trained`."""
        return trained_groups(self.student, self.trained)

    def accumulate(self, batch: Batch, backward: Backward) -> dict[str, float]:
        """One backward call; alpha weighs KL(teacher || student), beta KL(student || teacher)."""
        with torch.no_grad():
            target = last_hidden(self.teacher, batch)
        loss = _logit_loss(self.student, last_hidden(self.student, batch), self.teacher, target, self.alpha, self.beta)
        backward(loss)
        measure = "kl" if (self.alpha, self.beta) == (1, 0) else "bidirectional_kl"
        return {f"{measure}_to_{self.against}": loss.item()}


def _logit_loss(
    student: MarForCausalLM, hidden: Tensor, teacher: PreTrainedModel, target: Tensor, alpha: float, beta: float
) -> Tensor:
    head: Any = teacher.get_output_embeddings()
    return chunked_bidirectional_kl(
        hidden.flatten(0, 1), student.lm_head.weight, target.flatten(0, 1), head.weight, alpha, beta
    )


@dataclass
class SpikeAlign:
    """Each spiking mixer and FFN reconstructs its dense self from the dense model's inputs (ours)."""

    student: MarForCausalLM
    teacher: MarForCausalLM
    threshold_lr_scale: float = 5.0
    name: str = "spike_align"

    def parameter_groups(self) -> list[ParameterGroup]:
        """Everything inside the layers, one clip group a layer."""
        groups = trained_groups(self.student, "layers", self.threshold_lr_scale, clip=layer_of)
        self.student.model.norm.requires_grad_(False)
        return [group for group in groups if group.clip != "all"]

    def accumulate(self, batch: Batch, backward: Backward) -> dict[str, float]:
        """Two backward calls a layer; metrics are mean relative squared errors against the dense student."""
        mixer_errors, ffn_errors = [], []
        for layer, trace in zip(self.student.model.layers, mar_layers(self.teacher, batch), strict=True):
            block: Any = layer
            mixed, _ = block.mixer(block.input_layernorm(trace.hidden), None, None, batch["document_ids"])
            loss = relative_mse(mixed, trace.mixed)
            backward(loss)
            mixer_errors.append(loss.detach())
            assert trace.ffn is not None
            loss = relative_mse(block.mlp(block.post_attention_layernorm(trace.middle)), trace.ffn)
            backward(loss)
            ffn_errors.append(loss.detach())
        return {
            "mixer_relative_mse_to_dense": torch.stack(mixer_errors).mean().item(),
            "ffn_relative_mse_to_dense": torch.stack(ffn_errors).mean().item(),
        }


FEATURES = ("pre", "post", "both", "none")


@dataclass
class Spike:
    """SBDS (eq. 5-7): alpha KL(p || q) + beta KL(q || p) to the teacher p, plus the distance of normed features.

    features: `pre` compares the output of each layer's first RMSNorm (the paper's choice), `post` that of the final
    norm, `both` adds the two, `none` leaves logits only. against: what the teacher is, `dense` (the paper) or `llama`.
    energy_target: MAC-weighted spikes per input above which `energy_weight` x excess is added; None: off.
    """

    student: MarForCausalLM
    teacher: PreTrainedModel
    alpha: float = 0.2
    beta: float = 0.7
    features: str = "pre"
    trained: str = "layers"
    threshold_lr_scale: float = 5.0
    energy_target: float | None = None
    energy_weight: float = 1.0
    against: str = "dense"
    name: str = "spike"
    _sites: list[tuple[Neuron, float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ValueError(f"features is {self.features!r}; use one of {', '.join(map(repr, FEATURES))}.")
        macs = [
            (neuron, float(sum(linear.weight.numel() for linear in self.student.neuron_linears(layer, site))))
            for layer, site, neuron in self.student.neuron_sites()
        ]
        if self.energy_target is not None and not macs:
            raise ValueError("energy_target counts spikes, but the student has no neurons; insert them first.")
        total = sum(weight for _, weight in macs)
        self._sites = [(neuron, weight / total) for neuron, weight in macs]

    def parameter_groups(self) -> list[ParameterGroup]:
        """The set `trained`, thresholds at their own learning rate."""
        return trained_groups(self.student, self.trained, self.threshold_lr_scale)

    def _feature_modules(self, model: Any) -> list[nn.Module]:
        pre = [layer.input_layernorm for layer in model.model.layers] if self.features in ("pre", "both") else []
        return pre + ([model.model.norm] if self.features in ("post", "both") else [])

    def accumulate(self, batch: Batch, backward: Backward) -> dict[str, float]:
        """One backward call; every metric names its parts and its target."""
        with torch.no_grad(), captured(self._feature_modules(self.teacher)) as wanted:
            target = last_hidden(self.teacher, batch)
        with captured(self._feature_modules(self.student)) as got, self._counting() as counts:
            hidden = last_hidden(self.student, batch)
        loss = logits = _logit_loss(self.student, hidden, self.teacher, target, self.alpha, self.beta)
        metrics = {f"bidirectional_kl_to_{self.against}": logits.item()}
        if got:
            pairs = [feature_alignment(t.flatten(0, 1), s.flatten(0, 1)) for t, s in zip(wanted, got, strict=True)]
            # The mean over the layers, plus the final norm's own distance where there is one beyond them.
            layers = len(self.student.model.layers)
            distance = sum(torch.stack(part).mean() for part in (pairs[:layers], pairs[layers:]) if part)
            loss = loss + distance
            metrics[f"feature_distance_to_{self.against}"] = float(torch.as_tensor(distance).detach())
        if self.energy_target is not None:
            spikes = torch.stack(counts).sum()
            loss = loss + self.energy_weight * torch.relu(spikes - self.energy_target)
            metrics["spikes_per_input"] = spikes.item()
        backward(loss)
        return metrics

    @contextmanager
    def _counting(self) -> Iterator[list[Tensor]]:
        """MAC-weighted spikes per input of each site (see `Neuron.mean_spikes`)."""
        counts: list[Tensor] = []
        handles = []
        if self.energy_target is not None:
            for neuron, weight in self._sites:

                def count(_: nn.Module, args: tuple[Tensor], neuron: Neuron = neuron, weight: float = weight) -> None:
                    counts.append(neuron.mean_spikes(args[0]) * weight)

                handles.append(neuron.register_forward_pre_hook(count))
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()
