"""Spike statistics of a running model: SpikeMonitor watches every neuron, SpikeReport is what it saw.

Does: count spikes, non-zero codes, silence and saturation per layer, site and channel; weight them by elements and by
MACs; keep rasters. Does not: count the weight rows an engine really read (the engine does) or price spikes in joules
(mar.costs).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int8, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mar.config import SITES, Site
from mar.model import MarForCausalLM
from mar.neurons import Neuron


class SiteRate(NamedTuple):
    """What the energy model needs to know of a site.

    spikes: mean spikes per element over the whole inner loop, r·T. nonzero: share of elements whose code is not zero.
    """

    spikes: float
    nonzero: float


@dataclass(frozen=True)
class SiteSpikes:
    """Counts of one neuron site. An element is one channel of one token; each element runs T inner steps.

    linears: how many linears the site feeds. macs: multiply-accumulates of those linears for one dense token,
    d_in · Σ d_out. spikes: Σ|s| over elements and steps. saturated: elements that fired at every step.
    channel_spikes, channel_nonzero, channel_saturated: the same counts per channel.
    """

    layer: int
    site: Site
    time_steps: int
    channels: int
    linears: int
    macs: int
    tokens: int
    channel_spikes: Int64[Tensor, " channels"] = field(repr=False)
    channel_nonzero: Int64[Tensor, " channels"] = field(repr=False)
    channel_saturated: Int64[Tensor, " channels"] = field(repr=False)

    @property
    def elements(self) -> int:
        return self.tokens * self.channels

    @property
    def spikes(self) -> int:
        return int(self.channel_spikes.sum())

    @property
    def nonzero(self) -> int:
        return int(self.channel_nonzero.sum())

    @property
    def logical_rows(self) -> int:
        """Weight rows an input-major kernel has to read: one per non-zero code and linear fed."""
        return self.nonzero * self.linears

    @property
    def spikes_per_element(self) -> float:
        """r·T, the mean spike count; as a token's spikes share their sign it is also the mean |code|."""
        return self.spikes / self.elements

    @property
    def nonzero_share(self) -> float:
        return self.nonzero / self.elements

    @property
    def saturated_share(self) -> float:
        return int(self.channel_saturated.sum()) / self.elements

    @property
    def silent_channels(self) -> int:
        """Channels that never fired."""
        return int((self.channel_spikes == 0).sum())

    @property
    def spikes_per_nonzero(self) -> float:
        """Mean |code| where it is not zero: the additions an event costs. 0 if nothing fired."""
        return self.spikes / self.nonzero if self.nonzero else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures without the per-channel counts."""
        plain = ("layer", "site", "time_steps", "channels", "linears", "macs", "tokens", "spikes", "nonzero")
        derived = ("logical_rows", "spikes_per_element", "nonzero_share", "saturated_share", "silent_channels")
        return {name: getattr(self, name) for name in (*plain, *derived, "spikes_per_nonzero")}


@dataclass(frozen=True)
class SpikeTotals:
    """Figures over several sites. `*_per_mac` weights each site by the MACs it feeds, `*_per_element` by its channels.

    The MAC-weighted pair is what counts: spikes_per_mac decides the modelled energy, nonzero_per_mac the speed.
    """

    tokens: int
    elements: int
    macs: int
    spikes: int
    nonzero: int
    logical_rows: int
    spikes_per_element: float
    spikes_per_mac: float
    nonzero_per_element: float
    nonzero_per_mac: float
    saturated_per_element: float
    silent_share: float


def totals(sites: Collection[SiteSpikes]) -> SpikeTotals:
    """Sum and average sites that saw the same tokens; `macs` is per dense token, the counts are over all tokens."""
    elements = sum(site.elements for site in sites)
    macs = sum(site.macs for site in sites)
    spikes, nonzero = sum(site.spikes for site in sites), sum(site.nonzero for site in sites)
    return SpikeTotals(
        tokens=max(site.tokens for site in sites),
        elements=elements,
        macs=macs,
        spikes=spikes,
        nonzero=nonzero,
        logical_rows=sum(site.logical_rows for site in sites),
        spikes_per_element=spikes / elements,
        spikes_per_mac=sum(site.macs * site.spikes_per_element for site in sites) / macs,
        nonzero_per_element=nonzero / elements,
        nonzero_per_mac=sum(site.macs * site.nonzero_share for site in sites) / macs,
        saturated_per_element=sum(int(site.channel_saturated.sum()) for site in sites) / elements,
        silent_share=sum(site.silent_channels for site in sites) / sum(site.channels for site in sites),
    )


@dataclass(frozen=True)
class SpikeReport:
    """What a SpikeMonitor saw. text: name of the text the model read, which every rate depends on.

    rasters: spikes (T, channels, tokens) in {-1, 0, 1} of the first tokens, for the sites that were asked for.
    """

    sites: list[SiteSpikes]
    text: str
    rasters: dict[tuple[int, Site], Int8[Tensor, "steps channels tokens"]] = field(repr=False)

    @property
    def totals(self) -> SpikeTotals:
        return totals(self.sites)

    def by_site(self) -> dict[Site, SpikeTotals]:
        """The totals of each site over all layers."""
        present = {site.site for site in self.sites}
        return {name: totals([s for s in self.sites if s.site == name]) for name in SITES if name in present}

    def rates(self) -> dict[tuple[int, Site], SiteRate]:
        """Measured rates in the form that `mar.census.census` takes."""
        return {(s.layer, s.site): SiteRate(s.spikes_per_element, s.nonzero_share) for s in self.sites}

    def grid(self, figure: str) -> list[list[float | None]]:
        """One figure of SiteSpikes as layers × SITES, None where a site has no neuron; for plots."""
        found = {(site.layer, site.site): getattr(site, figure) for site in self.sites}
        layers = 1 + max(site.layer for site in self.sites)
        return [[found.get((layer, name)) for name in SITES] for layer in range(layers)]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers; channels and rasters stay out because they are large."""
        return {
            "text": self.text,
            "totals": asdict(self.totals),
            "by_site": {name: asdict(sums) for name, sums in self.by_site().items()},
            "sites": [site.to_dict() for site in self.sites],
        }


@dataclass
class _Counter:
    """Running counts of one site, on the neuron's own device so that counting never waits for it."""

    neuron: Neuron
    linears: list[nn.Linear]
    raster_tokens: int
    tokens: int = 0
    counts: Tensor | None = None
    raster: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, current: Tensor, mask: Bool[Tensor, "batch length"] | None) -> None:
        if mask is not None:
            if mask.shape != current.shape[:-1]:
                raise ValueError(
                    f"The attention mask has shape {tuple(mask.shape)} but the tokens have {tuple(current.shape[:-1])};"
                    " give a (batch, length) mask that ends with the current tokens."
                )
            current = current[mask.to(current.device)]
        current = current.reshape(-1, current.shape[-1])
        if self.raster_tokens > self.tokens:
            first = current[: self.raster_tokens - self.tokens]
            self.raster.append(self.neuron.spike_train(first).transpose(1, 2).cpu())
        size = self.neuron.encode(current).abs()
        seen = (size, size != 0, size == self.neuron.config.time_steps)
        sums = torch.stack([part.sum(0, dtype=torch.int64) for part in seen])
        self.counts = sums if self.counts is None else self.counts + sums
        self.tokens += current.shape[0]


class SpikeMonitor:
    """Watch the neurons of a spiking model while it runs; it changes nothing that the model computes.

        with SpikeMonitor(model, text="wikitext-2 valid") as monitor:
            model(input_ids=rows)
        report = monitor.summary()

    Padding is left out by the attention mask that the model is called with. Counts add up over calls, entries and exits
    until `reset`. Gradient checkpointing runs a layer twice and would be counted twice: watch in evaluation mode.
    rasters: (layer, site) pairs whose spike trains are kept for the first `raster_tokens` tokens.
    Raises ValueError for a model without neurons and for a raster of a site that has none.
    """

    def __init__(
        self,
        model: MarForCausalLM,
        text: str = "unnamed text",
        rasters: Collection[tuple[int, Site]] = (),
        raster_tokens: int = 64,
    ):
        self.model = model
        self.text = text
        self._counters: dict[tuple[int, Site], _Counter] = {}
        for layer, site, neuron in model.neuron_sites():
            kept = raster_tokens if (layer, site) in rasters else 0
            self._counters[layer, site] = _Counter(neuron, model.neuron_linears(layer, site), kept)
        if not self._counters:
            raise ValueError("The model has no neurons to watch; insert them first, with `mar insert`.")
        if missing := [pair for pair in rasters if pair not in self._counters]:
            raise ValueError(f"No neuron at {missing[0]} to draw a raster of; sites are (layer, one of {list(SITES)}).")
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> SpikeMonitor:
        if self._handles:
            raise RuntimeError("This SpikeMonitor is already watching; make a second one to nest them.")
        body = self.model.model
        self._handles.append(body.register_forward_pre_hook(self._take_mask, with_kwargs=True))
        for counter in self._counters.values():
            self._handles.append(counter.neuron.register_forward_pre_hook(self._count_with(counter)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mask = None

    def reset(self) -> None:
        """Forget all counts and rasters."""
        for counter in self._counters.values():
            counter.tokens, counter.counts = 0, None
            counter.raster.clear()

    def summary(self) -> SpikeReport:
        """The counts so far. Raises ValueError if the model has not read a token while being watched."""
        sites, rasters = [], {}
        for (layer, site), counter in self._counters.items():
            if counter.counts is None or not counter.tokens:
                raise ValueError("SpikeMonitor saw no tokens; call the model inside the with block first.")
            counts = counter.counts.cpu()
            sites.append(
                SiteSpikes(
                    layer=layer,
                    site=site,
                    time_steps=counter.neuron.config.time_steps,
                    channels=counts.shape[1],
                    linears=len(counter.linears),
                    macs=sum(linear.in_features * linear.out_features for linear in counter.linears),
                    tokens=counter.tokens,
                    channel_spikes=counts[0],
                    channel_nonzero=counts[1],
                    channel_saturated=counts[2],
                )
            )
            if counter.raster:
                rasters[layer, site] = torch.cat(counter.raster, dim=-1)
        return SpikeReport(sites, self.text, rasters)

    def _take_mask(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        # While decoding the mask also covers the tokens before this call.
        self._mask = None if mask is None or tokens is None else mask[:, mask.shape[1] - tokens.shape[1] :].bool()

    def _count_with(self, counter: _Counter) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        # Σ|s| is |Σ s|, as h and what a spike leaves of it never change sign within a token: one encode serves all.
        return lambda _, args: counter.add(args[0], self._mask)
