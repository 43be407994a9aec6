"""Checkpoints in, dense MAR models out: LLaMA attention to mixers, Llamba checkpoints.

Does: map weights, calibrate mixers on data. Does not: train anything, find teachers (mar.teachers), or insert neurons
(mar.insertion).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mar import kernels
from mar.config import MIXER_PRESETS, MarConfig
from mar.layers import llama_layers
from mar.model import MarForCausalLM

MIXER_CHOICES = ("input_gain", "bc_norm", "decay_bias", "conv_kernel", "chunk_size", "window")
"""Fields of MarConfig that a LLaMA checkpoint leaves open."""


@torch.no_grad()
def convert_llama(
    teacher: PreTrainedModel, preset: str = "fast", init: str = "attention", seed: int = 0, **choices: Any
) -> MarForCausalLM:
    """A dense MAR model from a LLaMA model: embedding, FFN, norms and head copied, attention turned into mixers.

    preset: a name of `MIXER_PRESETS`, whose choices keyword arguments override (e.g. `chunk_size=32`).
    init: `attention` puts W_v, W_k, W_q / sqrt(head_dim), W_o into x, B, C, out with KV heads repeated (Mamba in the
    Llama), `llamba` draws in_proj and out_proj at random. Both start from an identity convolution and an open gate.
    Raises ValueError for an architecture whose weights have no place in a MAR model.
    """
    source: Any = teacher.config
    _check_llama(source)
    if preset not in MIXER_PRESETS:
        raise ValueError(f"mixer preset is {preset!r}; use one of {', '.join(map(repr, MIXER_PRESETS))}.")
    if init not in ("attention", "llamba"):
        raise ValueError(f"init is {init!r}; use 'attention' or 'llamba'.")
    if unknown := sorted(set(choices) - set(MIXER_CHOICES)):
        raise ValueError(f"{unknown[0]!r} is no choice of a mixer; use one of {', '.join(map(repr, MIXER_CHOICES))}.")
    mixer = {**MIXER_PRESETS[preset], **choices}
    rotary = source.rope_parameters
    if mixer.get("window") and rotary["rope_type"] != "default":
        raise ValueError(
            f"The teacher's rotary positions are scaled (rope_type {rotary['rope_type']!r}), which a window has not; "
            "convert it without one."
        )
    config = MarConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_heads=source.num_attention_heads,
        head_dim=source.head_dim,
        state_size=source.head_dim,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        initializer_range=source.initializer_range,
        rms_norm_eps=source.rms_norm_eps,
        rotary_base=rotary["rope_theta"],
        mlp_bias=source.mlp_bias,
        tie_word_embeddings=source.tie_word_embeddings,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        **mixer,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = MarForCausalLM(config).to(teacher.device)  # type: ignore[arg-type]
    weights = {name: tensor.float() for name, tensor in teacher.state_dict().items()}
    own = {name for name in student.state_dict() if ".mixer." not in name}
    student.load_state_dict({name: weights[name] for name in own}, strict=False)
    if config.pad_token_id is not None:
        student.model.embed_tokens.padding_idx = config.pad_token_id
    for index, layer in enumerate(student.model.layers):
        mixer: Any = layer.mixer
        mixer.in_proj.weight[config.conv_size : config.conv_size + config.inner_size] = 0  # gate rows: z = z_bias
        if init == "attention":
            prefix = f"model.layers.{index}.self_attn."
            x, b, c, out = attention_as_ssm({key: weights[f"{prefix}{key}_proj.weight"] for key in "qkvo"}, source)
            mixer.in_proj.weight[: config.conv_size] = torch.cat([x, b, c])
            mixer.out_proj.weight.copy_(out)
            if config.decay_bias:
                mixer.in_proj.weight[-config.num_heads :] = 0  # decay starts as the bias alone
    student.generation_config.eos_token_id = getattr(teacher.generation_config, "eos_token_id", source.eos_token_id)
    return student.eval()


def attention_as_ssm(weights: dict[str, Tensor], config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, o projections, (heads * dim, d) and (d, heads * dim), as rows for x, B, C and the output projection.

    Without softmax and rotary positions, y_t = sum_s (q_t . k_s / sqrt(dim)) v_s is the recurrence at decay 1.
    """
    groups = config.num_attention_heads // config.num_key_value_heads

    def repeat(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (config.num_key_value_heads, config.head_dim))
        return heads.repeat_interleave(groups, dim=0).flatten(0, 1)

    return repeat(weights["v"]), repeat(weights["k"]), weights["q"] / config.head_dim**0.5, weights["o"]


def _check_llama(config: Any) -> None:
    kind = getattr(config, "model_type", None)
    if kind != "llama":
        raise ValueError(
            f"The teacher's architecture is {kind!r}; only LLaMA checkpoints (model_type 'llama') convert."
        )
    if config.attention_bias:
        raise ValueError(
            "The teacher has attention biases (attention_bias=true), for which a Discrete Mamba-2 mixer has no place; "
            "use a checkpoint without them."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"The teacher has {config.num_attention_heads} query and {config.num_key_value_heads} key-value heads, "
            "which do not divide evenly; its config.json is damaged."
        )


RATES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Decay rates (softplus of the logit, per token) that calibration tries for each head: 330 to 0.6 tokens of memory."""


@torch.no_grad()
def calibrate_mixers(student: MarForCausalLM, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Set each head's decay, output scale and skip D by least squares on one batch of rows, in place.

    batch: input_ids (b, l) and, where rows are packed, document_ids (b, l).

    Without it a converted mixer's output has the wrong size, and memories bear no relation to how far each head looks.
    Per head the decay rate is taken from `RATES` whose scan best fits that head's own attention output; per layer one
    least-squares solution over all heads then sets how much of scan and of current token goes to the output. With a
    window the scan fits what the window leaves, and the solution is for all three. Ours; needs a mixer converted with
    init 'attention' and a decay bias. A few thousand tokens suffice.
    """
    config = student.config
    if not config.decay_bias:
        raise ValueError(
            "calibrate_mixers sets decay biases, which this mixer has not; "
            "convert with decay_bias=True, or give no text."
        )
    batch = {name: tensor.to(student.device) for name, tensor in batch.items()}
    ids = batch.setdefault("document_ids", torch.zeros_like(batch["input_ids"]))
    rates = torch.tensor(RATES, device=student.device)
    for layer, trace in zip(student.model.layers, llama_layers(teacher, batch), strict=True):
        block: Any = layer
        mixer = block.mixer
        normed = block.input_layernorm(trace.hidden.float())
        x, _, b, c, _, _ = mixer.ssm_inputs(normed, None, None, ids)
        assert trace.heads is not None
        heads = trace.heads.float()
        seen = mixer.windowed(normed, ids) if config.window else None
        if seen is not None:
            heads = heads - seen
        scans = [_scan_at(rate, x, b, c, ids, config) for rate in rates]
        own = torch.stack([_fit_error(scan, x, heads) for scan in scans])
        choice = own.argmin(0)
        y = torch.stack([scans[index][:, :, head] for head, index in enumerate(choice.tolist())], dim=2)
        weight = mixer.out_proj.weight.unflatten(1, (config.num_heads, -1))
        found = (y, x) if seen is None else (y, x, seen)
        parts = torch.cat([torch.einsum("blhp,dhp->blhd", part, weight) for part in found], dim=2)
        columns = parts.transpose(2, 3).flatten(0, 2)  # (tokens * d, 2 or 3 * heads): what each head adds, per scalar
        gram = columns.T @ columns
        ridge = (1e-4 * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(gram), device=gram.device)
        scale, skip, *kept = torch.linalg.solve(gram + ridge, columns.T @ trace.mixed.float().flatten()).split(
            config.num_heads
        )
        # The model computes scale * (y + D x): a head that keeps next to nothing of its scan must not blow up its D.
        scale = torch.where(scale.abs() < 0.1 * skip.abs(), 0.1 * skip.abs() * torch.sign(scale), scale)
        mixer.decay_bias.copy_(torch.log(torch.expm1(rates[choice])))
        mixer.D.copy_(torch.where(scale == 0, 0.0, skip / scale))  # a head whose part of W_o is zero has no scale
        if kept:
            # It computes kept * (window + y' + D x'): the window decides the output's size, for it is most of it, and
            # the scan's part goes into the convolution of x.
            (kept,) = kept
            ratio = torch.where(kept == 0, 0.0, scale / kept).repeat_interleave(config.head_dim)
            mixer.conv_weight[: config.inner_size] *= ratio[:, None]
            scale = kept
        mixer.out_proj.weight.mul_(scale.repeat_interleave(config.head_dim))


def _scan_at(rate: Tensor, x: Tensor, b: Tensor, c: Tensor, ids: Tensor, config: MarConfig) -> Tensor:
    gain = 1.0 if config.input_gain == "none" else -torch.expm1(-rate)
    return kernels.scan(x * gain, -rate.expand(x.shape[:3]), b, c, None, ids, config.chunk_size)[0]


def _fit_error(y: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Squared error (h,) of target left by its best fit from y and x, one scalar each per head; all (b, l, h, p)."""
    yy, yx, xx, yt, xt, tt = (
        (a * b).sum((0, 1, 3)) for a, b in ((y, y), (y, x), (x, x), (y, target), (x, target), (target, target))
    )
    determinant = (yy * xx - yx * yx).clamp(min=1e-12)
    return tt - ((yt * xx - xt * yx) * yt + (xt * yy - yt * yx) * xt) / determinant


LLAMBA_NAMES = {
    "backbone.embedding.weight": "model.embed_tokens.weight",
    "backbone.final_layernorm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LLAMBA_LAYER_NAMES = {
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.conv1d.weight": "mixer.conv_weight",
    "mixer.conv1d.bias": "mixer.conv_bias",
    "mixer.z_bias": "mixer.z_bias",
    "mixer.D": "mixer.D",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


@torch.no_grad()
def convert_llamba(folder: str | Path) -> MarForCausalLM:
    """A dense MAR model from a published Llamba folder (config.json, model.safetensors), the paper's own stage 1.

    Raises FileNotFoundError or ValueError naming what is missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; a Llamba folder has config.json and model.safetensors.")
    try:
        config = _llamba_config(json.loads((folder / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is no whole JSON file ({error}); fetch it again.") from error
    student = MarForCausalLM(config)
    try:
        weights = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not a whole safetensors file ({error}); fetch it again."
        ) from error
    renamed = {}
    for name, tensor in weights.items():
        target = _llamba_target(name)
        if target is None:
            raise ValueError(
                f"The Llamba checkpoint has a tensor {name!r} that this layout does not know; give the "
                "checkpoint as it was published."
            )
        renamed[target] = (tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor).float()
    expected = student.state_dict()
    if config.tie_word_embeddings:
        renamed.setdefault("lm_head.weight", renamed.get("model.embed_tokens.weight"))
    for name, tensor in expected.items():
        if renamed.get(name) is None:
            raise ValueError(f"The Llamba checkpoint lacks a tensor for {name!r}; the download may be incomplete.")
        if renamed[name].shape != tensor.shape:
            raise ValueError(
                f"The Llamba tensor for {name!r} has shape {tuple(renamed[name].shape)} where config.json asks for "
                f"{tuple(tensor.shape)}; config and weights do not belong together."
            )
    if unexpected := sorted(set(renamed) - set(expected)):
        raise ValueError(
            f"The Llamba checkpoint has more layers than config.json says: {unexpected[0]!r}; config and weights do "
            "not belong together, so fetch both again."
        )
    student.load_state_dict(renamed)
    return student.eval()


def _llamba_target(name: str) -> str | None:
    if name in LLAMBA_NAMES:
        return LLAMBA_NAMES[name]
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["backbone", "layers"] and parts[3] in LLAMBA_LAYER_NAMES:
        return f"model.layers.{parts[2]}.{LLAMBA_LAYER_NAMES[parts[3]]}"
    return None


def _llamba_config(source: dict[str, Any]) -> MarConfig:
    try:
        ssm, mlp, width = source["ssm_cfg"], source["mlp_cfg"], source["d_model"]
        heads = ssm["n_v_heads"]
        wanted = {"n_qk_heads": heads, "expand": 1, "activation": "identity", "bias": False}
        for key, value in wanted.items():
            if ssm.get(key, value) != value:
                raise ValueError(f"Llamba's ssm_cfg.{key} is {ssm[key]!r}; only {value!r} can be converted.")
        multiple = source.get("pad_vocab_size_multiple", 8)
        return MarConfig(
            vocab_size=-(-source["vocab_size"] // multiple) * multiple,
            hidden_size=width,
            intermediate_size=mlp["intermediate_size"],
            num_hidden_layers=source["n_layer"],
            num_heads=heads,
            head_dim=width // heads,
            state_size=ssm["d_state"],
            conv_kernel=ssm.get("d_conv", 4),
            hidden_act=mlp.get("act_fn", "silu"),
            rms_norm_eps=source.get("norm_epsilon", 1e-5),
            tie_word_embeddings=source.get("tie_embeddings", False),
            **MIXER_PRESETS["llamba"],
        )
    except KeyError as error:
        raise ValueError(
            f"The Llamba config.json has no {error.args[0]!r}, which says the model's shape; fetch it again."
        ) from error
