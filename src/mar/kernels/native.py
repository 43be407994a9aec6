"""The ops of `mar.kernels` on mar's native core, for bf16 and fp32 tensors on a CPU.

Does: say whether tensors fit, describe them to the core, and tie its passes to autograd. Checks everything, as the core
trusts its pointers. Does not: choose between backends (`mar.kernels` does). Activations may be bf16; decays, states,
thresholds, sums and the products in between are fp32. Backward recomputes what is cheap and keeps only inputs, the
states between chunks and what goes into the gate.

The core works on the threads of torch's own OpenMP runtime, `torch.get_num_threads()` of them, so that no two pools
share the cores. Where that runtime is none that is known here, it works on the calling thread alone.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def load() -> tuple[Any, str]:
    """The core, ready to run on torch's threads, and how it runs; None and the reason where there is no core.

    Raises ValueError if MAR_ISA forces an instruction set that is unknown or that this CPU lacks.
    """
    try:
        core = importlib.import_module("mar._native")
        core.scan_forward  # noqa: B018 - missing from a core of an older version
    except ModuleNotFoundError:
        return None, "mar was installed without its native core; install g++ or clang and reinstall"
    except (AttributeError, ImportError) as error:
        if "MAR_ISA" in str(error):
            raise ValueError(str(error)) from error
        return None, f"the native core does not load ({error}); reinstall mar"
    address = _gomp_parallel()
    core.set_gomp(address)
    return core, f"{core.variant()['name']}, on {'the threads of torch' if address else 'the calling thread alone'}"


def _gomp_parallel() -> int:
    """Address of the entry point of the OpenMP runtime in this process, 0 if there is none."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    for path in sorted({line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}):
        entry = getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD), "GOMP_parallel", None)
        if entry is not None:
            return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


core, REASON = load()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the core can work on these activations: of one dtype it knows, on a CPU, with something in them."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(
        tensor.dtype == given[0].dtype and tensor.dtype in DTYPES and tensor.device.type == "cpu" and tensor.numel() > 0
        for tensor in given
    )


def scan(
    x: Float[Tensor, "b l h p"],
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    state: Float[Tensor, "b h p n"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """As `reference.scan_recurrent`, for tensors that the core `takes`; differentiable in x, log_decay, b, c, state."""
    given = (x, log_decay, b, c, state)
    return _Scan.apply(*given, document_ids, _differentiates(given))  # type: ignore[return-value]


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"],
    past: Float[Tensor, "b k_1 c"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """As `reference.causal_conv`, for x that the core `takes` and at most `core.conv_taps` taps."""
    return _Conv.apply(x, weight, bias, past, document_ids)  # type: ignore[return-value]


def mixer(
    projected: Float[Tensor, "b l wide"],
    log_decay: Float[Tensor, "b l h"],
    conv_weight: Float[Tensor, "c k"],
    conv_bias: Float[Tensor, " c"],
    z_bias: Float[Tensor, " inner"],
    skip: Float[Tensor, " h"],
    past: Float[Tensor, "b k_1 c"] | None,
    state: Float[Tensor, "b h p n"] | None,
    document_ids: Int[Tensor, "b l"] | None,
    gain: bool,
    unit: bool,
) -> tuple[Float[Tensor, "b l inner"], Float[Tensor, "b h p n"]]:
    """Everything of a mixer between its projections, and the last state: convolution, scan, skip and gate.

    projected: x, B, C and z side by side. gain: x enters the state times 1 - decay, else times 1. unit: B is scaled to
    length 1 and C to sqrt(n). Differentiable in all but `past` and `document_ids`.
    """
    given = (projected, log_decay, conv_weight, conv_bias, z_bias, skip, state)
    return _Mixer.apply(*given, past, document_ids, gain, unit, _differentiates(given))  # type: ignore[return-value]


def staircase(
    current: Float[Tensor, "*batch channels"],
    threshold: Float[Tensor, "thresholds"],
    codes: tuple[float, float],
    passing: tuple[float, float],
    precharge: float,
) -> Float[Tensor, "*batch channels"]:
    """V clamp(trunc(I / V + p sign(I))): the output of a neuron at tau = 1, for a current that the core `takes`.

    codes: the outermost ones. passing: gradients of the current pass while I / V lies strictly between these; as
    `mar.neurons` has it, the gradient of V is code - S'(v) v. precharge: p.
    """
    return _Staircase.apply(current, threshold, codes, passing, precharge)  # type: ignore[return-value]


def mean_spikes(
    current: Float[Tensor, "*batch channels"],
    threshold: Float[Tensor, "thresholds"],
    codes: tuple[float, float],
    precharge: float,
) -> Float[Tensor, ""]:
    """Mean size of the codes of `staircase`, exact, fp32; backward, of |I| / V cut at the outermost codes."""
    return _MeanSpikes.apply(current, threshold, codes, precharge)  # type: ignore[return-value]


def _differentiates(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _packed(tensor: Tensor | None) -> Tensor | None:
    """A parameter, state or decay as the core reads it. The caller keeps it alive until the core is done."""
    return None if tensor is None else tensor.detach().float().contiguous()


def _ids(document_ids: Tensor | None) -> Tensor | None:
    return None if document_ids is None else document_ids.to(torch.int64).contiguous()


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _view(tensor: Tensor, channel: int = 0, head: int = 0) -> Any:
    """(b, l, h, p) as it is; (b, l, c) from `channel` on, in heads of `head` channels."""
    address = tensor.data_ptr() + channel * tensor.element_size()
    return core.View(address, tensor.stride(0), tensor.stride(1), tensor.stride(2) if tensor.dim() == 4 else head)


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return None if gradient is None or tensor is None else gradient.to(tensor.dtype)


def _fp32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class Call:
    """A description for the core, and the tensors that it points to, which must live as long."""

    def __init__(self, kind: str, **fields: Any):
        self.call = getattr(core, kind)()
        self.alive: list[Tensor] = []
        self.set(**fields)

    def set(self, **fields: Any) -> None:
        """Numbers and views as they are, tensors by their address."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self.alive.append(value)
            setattr(self.call, name, _address(value) if value is None or isinstance(value, Tensor) else value)

    def run(self, kernel: str) -> None:
        """One pass of the core, on torch's threads."""
        getattr(core, kernel)(self.call, torch.get_num_threads())


def _scan_call(heads: int, width: int, size: int, log_decay: Tensor, state: Tensor | None, ids: Tensor | None) -> Call:
    batch, length, _ = log_decay.shape
    scan = Call("ScanCall", batch=batch, length=length, heads=heads, width=width, size=size)
    scan.set(log_decay=_packed(log_decay), first=_packed(state), document_ids=_ids(ids))
    return scan


def _state(call: Any) -> Tensor:
    return _fp32(call.batch, call.heads, call.width, call.size)


def _states(call: Any) -> Tensor:
    return _fp32(call.batch, call.heads, -(-call.length // core.scan_chunk), call.width, call.size)


class _Scan(torch.autograd.Function):
    @staticmethod
    def _describe(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None, ids: Tensor | None) -> Call:
        scan = _scan_call(x.shape[2], x.shape[3], b.shape[3], log_decay, state, ids)
        scan.set(bf16=x.dtype == torch.bfloat16, x=_view(x), b=_view(b), c=_view(c))
        return scan

    @staticmethod
    def forward(ctx, x, log_decay, b, c, state, document_ids, keep):
        ctx.dtypes = [t.dtype for t in (log_decay, b, c)]
        x, b, c = dense_rows(x), dense_rows(b.to(x.dtype)), dense_rows(c.to(x.dtype))
        scan = _Scan._describe(x, log_decay, b, c, state, document_ids)
        y, last = x.new_empty(x.shape), _state(scan.call)
        states = _states(scan.call) if keep else None
        scan.set(out=_view(y), states=states, last=last)
        scan.run("scan_forward")
        ctx.save_for_backward(x, log_decay, b, c, state, document_ids, states)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):  # type: ignore[override]
        *inputs, states = ctx.saved_tensors
        x, log_decay, b, c, state, _ = inputs
        scan = _Scan._describe(*inputs)
        dy = x.new_zeros(x.shape) if dy is None else dense_rows(dy)
        dx, db, dc = x.new_empty(x.shape), b.new_empty(b.shape), c.new_empty(c.shape)
        dlog_decay = _fp32(*log_decay.shape)
        dstate = None if state is None else _state(scan.call)
        scan.set(states=states, dout=_view(dy), dlast=_packed(dlast), dx=_view(dx), db=_view(db), dc=_view(dc))
        scan.set(dlog_decay=dlog_decay, dfirst=dstate)
        scan.run("scan_backward")
        dlog_decay, db, dc = (g.to(dtype) for g, dtype in zip((dlog_decay, db, dc), ctx.dtypes, strict=True))
        return dx, dlog_decay, db, dc, _like(dstate, state), None, None


def _conv_call(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, ids: Tensor | None) -> Call:
    """x may be wider than the convolution, which then reads its first channels."""
    channels, taps = weight.shape
    conv = Call("ConvCall", batch=x.shape[0], length=x.shape[1], channels=channels, taps=taps)
    conv.set(bf16=x.dtype == torch.bfloat16, x=_view(x), weight=_packed(weight.t()), bias=_packed(bias))
    conv.set(past=None if past is None else past.detach().to(x.dtype).contiguous(), document_ids=_ids(ids))
    return conv


def _conv_gradients(conv: Call, dy: Tensor, dx: Tensor, dpast: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fills dx and dpast; returns the gradients of weight and bias."""
    call = conv.call
    dweight, dbias = _fp32(call.batch, call.taps, call.channels), _fp32(call.batch, call.channels)
    conv.set(dy=_view(dy), dx=_view(dx), dpast=dpast, dweight_parts=dweight, dbias_parts=dbias)
    conv.run("conv_backward")
    return dweight.sum(0).t(), dbias.sum(0)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, document_ids):
        x = dense_rows(x)
        conv, y = _conv_call(x, weight, bias, past, document_ids), x.new_empty(x.shape)
        conv.set(y=_view(y))
        conv.run("conv_forward")
        ctx.save_for_backward(x, weight, bias, past, document_ids)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, bias, past, _ = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dpast = _fp32(*past.shape) if ctx.needs_input_grad[3] else None
        dweight, dbias = _conv_gradients(_conv_call(*ctx.saved_tensors), dense_rows(dy), dx, dpast)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), _like(dpast, past), None


class _Mixer(torch.autograd.Function):
    @staticmethod
    def _describe(inputs: tuple[Any, ...], gain: bool, unit: bool) -> tuple[Call, Call, Tensor]:
        """The calls of convolution and scan, and x, B and C after the convolution, which has run."""
        projected, log_decay, conv_weight, conv_bias, z_bias, skip, state, past, ids = inputs
        channels, inner, heads = conv_weight.shape[0], z_bias.shape[0], skip.shape[0]
        width, size = inner // heads, (channels - inner) // 2 // heads
        mixed = projected.new_empty(*projected.shape[:2], channels)
        conv = _conv_call(projected, conv_weight, conv_bias, past, ids)
        conv.set(y=_view(mixed))
        conv.run("conv_forward")
        scan = _scan_call(heads, width, size, log_decay, state, ids)
        scan.set(bf16=projected.dtype == torch.bfloat16, gain=gain, unit=unit)
        scan.set(skip=_packed(skip), z=_view(projected, channels, width), z_bias=_packed(z_bias))
        scan.set(**dict(zip("xbc", _parts(mixed, scan.call), strict=True)))
        return conv, scan, mixed

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, gain, unit, keep = arguments
        inputs[0] = projected = dense_rows(inputs[0])
        _, scan, mixed = _Mixer._describe(tuple(inputs), gain, unit)
        call = scan.call
        gated, last = projected.new_empty(*projected.shape[:2], call.heads * call.width), _state(call)
        kept, states = (torch.empty_like(gated), _states(call)) if keep else (None, None)
        scan.set(out=_view(gated, head=call.width), kept=kept, states=states, last=last)
        scan.run("scan_forward")
        del mixed  # made anew for the backward pass
        ctx.save_for_backward(*inputs, kept, states)
        ctx.choices = gain, unit
        ctx.set_materialize_grads(False)
        return gated, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dgated, dlast):  # type: ignore[override]
        *inputs, kept, states = ctx.saved_tensors
        projected, *parameters, state, _, _ = inputs
        conv, scan, mixed = _Mixer._describe(tuple(inputs), *ctx.choices)
        call = scan.call
        dgated = torch.zeros_like(kept) if dgated is None else dense_rows(dgated)
        dmixed, dprojected = torch.empty_like(mixed), projected.new_empty(projected.shape)
        dskip, dz_bias = _fp32(call.batch, call.heads), _fp32(call.batch, call.heads * call.width)
        dlog_decay = _fp32(call.batch, call.length, call.heads)
        dstate = None if state is None else _state(call)
        scan.set(kept=kept, states=states, dout=_view(dgated, head=call.width), dlast=_packed(dlast))
        scan.set(**dict(zip(("dx", "db", "dc"), _parts(dmixed, call), strict=True)))
        scan.set(dz=_view(dprojected, conv.call.channels, call.width), dlog_decay=dlog_decay, dfirst=dstate)
        scan.set(dskip_parts=dskip, dz_bias_parts=dz_bias)
        scan.run("scan_backward")
        dweight, dbias = _conv_gradients(conv, dmixed, dprojected, None)
        gradients = (dlog_decay, dweight, dbias, dz_bias.sum(0), dskip.sum(0))
        cast = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, parameters, strict=True)]
        return dprojected, *cast, _like(dstate, state), *[None] * 5


def _parts(mixed: Tensor, call: Any) -> tuple[Any, Any, Any]:
    """Views of x, B and C, which lie side by side, in heads."""
    b = call.heads * call.width
    c = b + call.heads * call.size
    return _view(mixed, 0, call.width), _view(mixed, b, call.size), _view(mixed, c, call.size)


class _Staircase(torch.autograd.Function):
    @staticmethod
    def _describe(rows: Tensor, threshold: Tensor, codes: Any, passing: Any, precharge: float) -> Call:
        wide = threshold.detach().float().expand(rows.shape[1]).contiguous()
        call = Call("StaircaseCall", rows=rows.shape[0], channels=rows.shape[1], bf16=rows.dtype == torch.bfloat16)
        call.set(precharge=precharge, low=codes[0], high=codes[1], pass_low=passing[0], pass_high=passing[1])
        call.set(current=rows, threshold=wide)
        return call

    @staticmethod
    def forward(ctx, current, threshold, *choices):
        rows = current.reshape(-1, current.shape[-1]).contiguous()
        output = torch.empty_like(rows)
        call = _Staircase._describe(rows, threshold, *choices)
        call.set(output=output)
        call.run("staircase_forward")
        ctx.save_for_backward(rows, threshold)
        ctx.choices = choices
        return output.view(current.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[override]
        doutput = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        return *_staircase_gradients(ctx, "staircase_backward", gradient.shape, doutput=doutput), *[None] * 3


def _staircase_gradients(
    ctx: Any, kernel: str, shape: torch.Size, **fields: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Of a current of this shape and of V, as the kernel gives them for what the forward pass kept."""
    rows, threshold = ctx.saved_tensors
    call = _Staircase._describe(rows, threshold, *ctx.choices)
    needs_current, needs_threshold, *_ = ctx.needs_input_grad
    dcurrent = torch.empty_like(rows) if needs_current else None
    parts = _fp32(core.staircase_items(call.call), rows.shape[1]) if needs_threshold else None
    call.set(dcurrent=dcurrent, dthreshold_parts=parts, **fields)
    call.run(kernel)
    return (
        None if dcurrent is None else dcurrent.view(shape),
        None if parts is None else parts.sum(0).sum_to_size(threshold.shape).to(threshold.dtype),
    )


class _MeanSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current, threshold, codes, precharge):
        rows = current.reshape(-1, current.shape[-1]).contiguous()
        ctx.choices = codes, codes, precharge
        call = _Staircase._describe(rows, threshold, *ctx.choices)
        parts = torch.empty(core.staircase_items(call.call), dtype=torch.float64)
        call.set(spikes_parts=parts)
        call.run("spikes_forward")
        ctx.save_for_backward(rows, threshold)
        ctx.shape = current.shape
        return (parts.sum() / rows.numel()).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[override]
        share = gradient.item() / ctx.shape.numel()
        return *_staircase_gradients(ctx, "spikes_backward", ctx.shape, share=share), None, None
