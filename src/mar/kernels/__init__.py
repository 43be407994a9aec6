"""One name per op, each bound to the best backend for this machine; `backends()` says which and why.

Does: name the ops. Does not: import anything else of mar.
"""

from __future__ import annotations

from mar.kernels.chunked import causal_conv, scan, scan_step

__all__ = ["backends", "causal_conv", "scan", "scan_step"]


def backends() -> dict[str, str]:
    """Op to 'backend: reason', as `mar info` prints it."""
    reason = "torch: matrix products per chunk, hand-written backward; the only backend of this version"
    return {"scan": reason, "scan_step": "torch: one fused update", "causal_conv": "torch: shifted multiply-adds"}
