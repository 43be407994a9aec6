"""The Discrete Mamba-2 mixer: the layer that takes attention's place, linear in length and constant in memory.

Does: in_proj, causal convolution, state-space scan, gate, out_proj; one code path for one token or many, with a state
that continues a sequence. Does not: know about caches, residuals or norms (mar.model does).
Source: Discrete Mamba-2 of Llamba/MOHAWK, which the paper adopts (method, section 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mar import kernels
from mar.config import MarConfig
from mar.kernels import reference
from mar.neurons import build_neuron
from mar.window import attend, carried, carry_over


class MixerState(NamedTuple):
    """What a mixer carries over: the convolution's last K - 1 inputs (b, k - 1, c) and the state (b, h, p, n).

    With a window the convolution's inputs are (b, window, c + 1) instead, as `mar.window.carried` says.
    """

    conv: Tensor
    ssm: Tensor


class DiscreteMamba2(nn.Module):
    """x, B, C, z and decay logits from one projection; y = SSM(conv(x, B, C)); out_proj(y * silu(z + z_bias)).

    Per head: decay = exp(-softplus(A_log)), S_t = decay_t S_{t-1} + gain_t x_t B_t^T, y_t = S_t C_t + D x_t, where gain
    is 1 (as published) or 1 - decay. Decay logits, decay and state are fp32 under any autocast. With a window (ours) y
    also gets the softmax attention of x, B and C, before their convolution, over the last tokens and the first one.
    """

    def __init__(self, config: MarConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, config.in_proj_size, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(config.conv_size, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(config.conv_size))
        self.z_bias = nn.Parameter(torch.empty(config.inner_size))
        self.D = nn.Parameter(torch.empty(heads))
        self.decay_bias = nn.Parameter(torch.empty(heads)) if config.decay_bias else None
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        in_neuron, out_neuron = config.neuron("in_proj"), config.neuron("out_proj")
        self.in_neuron = build_neuron(in_neuron, config.hidden_size) if in_neuron else nn.Identity()
        self.out_neuron = build_neuron(out_neuron, config.inner_size) if out_neuron else nn.Identity()

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        state: MixerState | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
        document_ids: Int[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], MixerState]:
        """Mix tokens. `mask` is False at padding, which leaves no trace before tokens; `state` continues earlier calls.

        `document_ids` restarts convolution and state where it changes within a row.
        """
        projected, log_decay = self._project(hidden)
        past = state
        if self.config.window and state is not None:
            # Position apart, the tail of the window ends with the convolution's.
            past = state._replace(conv=state.conv[:, self.config.window - self.config.conv_kernel + 1 :, :-1])
        # One token without gradients is decoding, where a step of the state costs least.
        step = hidden.shape[1] == 1 and not torch.is_grad_enabled()
        if mask is None and not step and kernels.mixer_takes(projected, self.conv_weight):
            gated, ssm, conv = self._fused(projected, log_decay, past, document_ids)
        else:
            gated, ssm, conv = self._composed(projected, log_decay, past, mask, document_ids, step)
        if self.config.window:
            seen, conv = self._windowed(projected, None if state is None else state.conv, mask, document_ids)
            gated = gated + seen.flatten(2) * self._gate(projected[..., self.config.conv_size :])
        return self.out_proj(self.out_neuron(gated)), MixerState(conv, ssm)

    def windowed(
        self, hidden: Float[Tensor, "b l d"], document_ids: Int[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b l h p"]:
        """What the window alone adds to y."""
        return self._windowed(self._project(hidden)[0], None, None, document_ids)[0]

    def _windowed(
        self, projected: Tensor, past: Tensor | None, mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the window adds to y (b, l, h, p), and what it carries over."""
        config = self.config
        xbc = projected[..., : config.conv_size]
        rows, positions, first = carried(xbc, past, config.window, mask, document_ids)
        seen = attend(rows, positions, first, config.num_heads, config.head_dim, config.window, config.rotary_base)
        return seen, carry_over(rows, positions, first, config.window)

    def _gate(self, z: Tensor) -> Tensor:
        return F.silu(z + self.z_bias.to(z.dtype))

    def _fused(
        self, projected: Tensor, log_decay: Tensor, state: MixerState | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input of out_proj (b, l, d_inner), state, and conv tail, by the one native op."""
        past, ssm = (None, None) if state is None else state
        parameters = (self.conv_weight, self.conv_bias, self.z_bias, self.D)
        gain, unit = self.config.input_gain != "none", self.config.bc_norm == "l2"
        gated, ssm = kernels.mixer(projected, log_decay, *parameters, past, ssm, document_ids, gain, unit)
        xbc = projected[..., : self.config.conv_size]
        return gated, ssm, _tail(xbc, past, self.config.conv_kernel - 1, document_ids)

    def _composed(
        self,
        projected: Tensor,
        log_decay: Tensor,
        state: MixerState | None,
        mask: Tensor | None,
        document_ids: Tensor | None,
        step: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, op by op: the plain statement of the layer."""
        x, b, c, z, conv = self._convolved(projected, state, mask, document_ids)
        scaled = x if self.config.input_gain == "none" else x * (-torch.expm1(log_decay))[..., None].to(x.dtype)
        if mask is not None:
            scaled = scaled * mask[..., None, None].to(x.dtype)
            log_decay = log_decay * mask[..., None]
        ssm = None if state is None else state.ssm
        if step:
            if ssm is None:
                ssm = scaled.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1], dtype=log_decay.dtype)
            y, ssm = kernels.scan_step(scaled[:, 0], log_decay[:, 0], b[:, 0], c[:, 0], ssm)
            y = y[:, None]
        else:
            y, ssm = kernels.scan(scaled, log_decay, b, c, ssm, document_ids, self.config.chunk_size)
        y = torch.addcmul(y, x, self.D[:, None].to(x.dtype)).flatten(2)
        return y * self._gate(z), ssm, conv

    def matrix(
        self, hidden: Float[Tensor, "b l d"], document_ids: Int[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b h l l"]:
        """The mixing matrix of each head, gain and skip included: SSM(x) = matrix @ x (MOHAWK's orientation target).

        Raises ValueError for a mixer with a window, which is not one matrix.
        """
        if self.config.window:
            raise ValueError(
                f"window is {self.config.window}: a scan and attention beside it are not one mixing matrix; "
                "convert without a window to orient mixers."
            )
        _, log_decay, b, c, _, _ = self.ssm_inputs(hidden, None, None, document_ids)
        matrix = reference.scan_matrix(log_decay, b, c, document_ids)
        if self.config.input_gain == "one_minus_decay":
            matrix = matrix * -torch.expm1(log_decay).transpose(1, 2)[:, :, None, :]
        return matrix + torch.diag_embed(self.D[:, None].expand(-1, hidden.shape[1]))

    def ssm_inputs(
        self, hidden: Tensor, state: MixerState | None, mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (b, l, h, p), log decay (b, l, h), B and C (b, l, h, n), gate logits z (b, l, d_inner), conv tail."""
        projected, log_decay = self._project(hidden)
        x, b, c, z, conv = self._convolved(projected, state, mask, document_ids)
        return x, log_decay, b, c, z, conv

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """x, B, C and z side by side, before the convolution (b, l, conv + d_inner), and log decay (b, l, h)."""
        spikes = self.in_neuron(hidden)
        wide = self.config.conv_size + self.config.inner_size
        # Split, not sliced: a slice's gradient is a whole matrix of zeros to fill.
        main, rows = self.in_proj.weight.split([wide, len(self.in_proj.weight) - wide])
        projected = F.linear(spikes, main)
        with torch.autocast(hidden.device.type, enabled=False):
            # bf16 logits would quantise the decay itself, so these few rows are always multiplied in fp32; and by no
            # linear, which int8 products would take.
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            logits = spikes.to(rows.dtype) @ rows.t()
            if self.decay_bias is not None:
                logits = logits + self.decay_bias
            return projected, -F.softplus(logits)

    def _convolved(
        self, projected: Tensor, state: MixerState | None, mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (b, l, h, p), B and C (b, l, h, n), gate logits z (b, l, d_inner), conv tail."""
        config = self.config
        xbc, z = projected.split([config.conv_size, config.inner_size], dim=-1)
        if mask is not None:
            xbc = xbc * mask[..., None].to(xbc.dtype)
        past = None if state is None else state.conv
        mixed = kernels.causal_conv(xbc, self.conv_weight, self.conv_bias, past, document_ids)
        conv = _tail(xbc, past, config.conv_kernel - 1, document_ids)
        x, b, c = mixed.split([config.inner_size, *[config.num_heads * config.state_size] * 2], dim=-1)
        x, b, c = (part.unflatten(-1, (config.num_heads, -1)) for part in (x, b, c))
        if config.bc_norm == "l2":
            b, c = _unit(b, 1.0), _unit(c, config.state_size**0.5)
        return x, b, c, z, conv


def _unit(vectors: Tensor, length: float) -> Tensor:
    """Scale the last dimension to `length`; the epsilon bounds the gradient at zero, where vectors stay zero."""
    norm = vectors.square().sum(-1, keepdim=True, dtype=torch.promote_types(vectors.dtype, torch.float32))
    return vectors * (torch.rsqrt(norm + 1e-5) * length).to(vectors.dtype)


def _tail(xbc: Tensor, past: Tensor | None, count: int, document_ids: Tensor | None) -> Tensor:
    """The last `count` inputs of the convolution, zeros for what precedes the sequence or its last document."""
    length = xbc.shape[1]
    if past is None:
        past = xbc.new_zeros(xbc.shape[0], count, xbc.shape[2])
    tail = torch.cat([past.to(xbc.dtype), xbc[:, max(0, length - count) :].detach()], dim=1)
    tail = tail[:, tail.shape[1] - count :]
    if document_ids is not None and length:
        ids = reference.segments(document_ids)
        ids = torch.cat([ids[:, :1].expand(-1, count), ids], dim=1)[:, length:]
        tail = tail * (ids == ids[:, -1:])[..., None]
    return tail
