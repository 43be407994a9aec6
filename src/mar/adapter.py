"""The native engine in the place of a torch model: for streams and chats, held-out figures and lm-eval's tasks.

Does: take and give tensors around `mar.engine.Engine`, keep a stream's state, turn the engine's counters into rates.
Does not: train, give hidden states, or sample. Importable without the native core, which `load_engine` asks for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from mar.config import SITES, MarConfig, Site
from mar.costs import energy
from mar.folder import load_tokenizer
from mar.quiet import quiet
from mar.spikes import SiteRate

BLOCK = 256
"""Tokens whose logits are held at a time."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch on this thread alone, for small work between reads of the engine.

    Torch's other threads spin for milliseconds after each operation, on the cores that the engine's own then lack: with
    two cores that took 2.6 times the tokens per second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class EngineCache:
    """What the engine keeps of one or more sequences between calls."""

    def __init__(self, states: list[Any]):
        self.states = states


class EngineModel(PreTrainedModel):
    """Token ids to logits as of MarForCausalLM, computed by the engine; it has no parameters and no gradients.

    What it counts begins anew with `reset`.
    """

    config: MarConfig
    config_class = MarConfig

    def __init__(self, engine: Any, config: MarConfig, generation_config: GenerationConfig | None = None):
        super().__init__(config)
        self.engine = engine
        self.generation_config = generation_config
        self.precision = f"native {engine.settings['precision']}"
        self._read_at: list[float] = []

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def new_cache(self, rows: int = 1) -> EngineCache:
        """The states before any token."""
        return EngineCache([self.engine.new_state() for _ in range(rows)])

    def forward(
        self,
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Int[Tensor, "rows length"] | Bool[Tensor, "rows length"] | None = None,
        past_key_values: EngineCache | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits (rows, kept, V), fp32; zeros where attention_mask is 0, which leaves no trace in the state.

        past_key_values: of `new_cache`, brought up to date. logits_to_keep: 0 for all positions, or 1 for the last.
        """
        cache = past_key_values or self.new_cache(len(input_ids))
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        logits = torch.zeros(*input_ids.shape[:1], logits_to_keep or input_ids.shape[1], self.config.vocab_size)
        for row, state in enumerate(cache.states):
            ids = input_ids[row, kept[row]].numpy()
            if logits_to_keep:
                logits[row, -1] = torch.from_numpy(self.engine.prefill(state, ids))
            elif len(ids):
                logits[row, kept[row]] = torch.from_numpy(self.engine.logits(state, ids))
        self._read_at.append(time.perf_counter())
        return CausalLMOutputWithPast(logits=logits)  # type: ignore[arg-type]

    def logit_blocks(
        self, input_ids: Int[Tensor, "rows length"], document_ids: Int[Tensor, "rows length"]
    ) -> Iterator[Float[Tensor, "tokens vocab"]]:
        """Logits after all tokens of packed rows but each row's last, in blocks; every document starts afresh."""
        for ids, documents in zip(input_ids.cpu().numpy(), document_ids.cpu().numpy(), strict=True):
            starts = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
            for start, stop in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
                state = self.engine.new_state()
                for first in range(start, stop, BLOCK):
                    yield torch.from_numpy(self.engine.logits(state, ids[first : min(first + BLOCK, stop)]))

    @one_torch_thread()
    def continuations(self, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Of each choice after the context: its log-probability, and whether it is what greedy decoding would write.

        The context is read once and its state forked. Both must hold at least one token, or ValueError is raised.
        """
        before = self.engine.new_state()
        last, answers = self.engine.prefill(before, context), []
        for choice in choices:
            parts = [last[None]]
            if len(choice) > 1:  # a choice of one token is judged by what the context left behind
                parts.append(self.engine.logits(before.copy(), choice[:-1]))
            logits = torch.from_numpy(np.concatenate(parts))
            wanted = torch.tensor(choice)[:, None]
            log_probability = logits.log_softmax(-1).gather(1, wanted).double().sum().item()
            answers.append((log_probability, bool((logits.argmax(-1, keepdim=True) == wanted).all())))
        return answers

    def reset(self) -> None:
        """Count spikes and time anew."""
        self.engine.reset_counters()
        self._read_at.clear()

    def rates(self) -> dict[tuple[int, Site], SiteRate]:
        """Spikes and non-zero share per input of every neuron, over all tokens read since `reset`; {} if none was."""
        counted, sizes = self.engine.counters(), self._inputs()
        return {
            (site["layer"], site["site"]): SiteRate(
                *(site[name] / (counted["tokens"] * sizes[site["site"]]) for name in ("spikes", "nonzero"))
            )
            for site in counted["sites"]
            if counted["tokens"] and site["site"] in (self.config.neurons or {})
        }

    def usage(self) -> dict[str, float]:
        """Of what was read since `reset`: speed, spikes and modelled energy, as far as there is something to say.

        tokens_per_s: from one read to the next, so the prompt's is left out. spikes_per_mac, nonzero_per_mac: spikes
        per input (r·T) and share of inputs that are not zero, weighted by the MACs they feed. energy_uj: modelled, per
        token, 45nm-fp32, compute only, head included.
        """
        found: dict[str, float] = {}
        if len(self._read_at) > 1:
            found["tokens_per_s"] = (len(self._read_at) - 1) / (self._read_at[-1] - self._read_at[0])
        found |= self.rates_per_mac()
        rates, config = self.rates(), self.config
        if rates or not config.neurons:
            found["energy_uj"] = energy(config, rates=rates or None).with_head
        return found

    def rates_per_mac(self) -> dict[str, float]:
        """`rates` averaged over the neurons, each weighted by the MACs it feeds: spikes_per_mac and nonzero_per_mac."""
        rates, config, sizes = self.rates(), self.config, self._inputs()
        wide = (config.in_proj_size, config.hidden_size, 2 * config.intermediate_size, config.hidden_size)
        macs = {site: sizes[site] * outputs for site, outputs in zip(SITES, wide, strict=True)}
        total = sum(macs[site] for _, site in rates)
        return {
            f"{name}_per_mac": sum(macs[site] * getattr(rate, name) for (_, site), rate in rates.items()) / total
            for name in SiteRate._fields
            if rates
        }

    def _inputs(self) -> dict[Site, int]:
        """Inputs of each site."""
        config = self.config
        widths = (config.hidden_size, config.inner_size, config.hidden_size, config.intermediate_size)
        return dict(zip(SITES, widths, strict=True))


def load_engine(
    folder: str | Path, precision: str | None = None, threads: int | None = None
) -> tuple[EngineModel, PreTrainedTokenizerBase]:
    """Engine and tokenizer of a MAR folder; precision and threads as in `mar.Engine.from_pretrained`.

    Raises FileNotFoundError or ValueError, in one sentence, for what is no MAR folder or cannot be run, and where mar
    was installed without its native core.
    """
    try:
        from mar.engine import Engine
    except ImportError as error:
        raise ValueError(str(error)) from error
    engine = Engine.from_pretrained(folder, precision, threads=threads)
    tokenizer = load_tokenizer(folder)
    generation = None
    with quiet():
        config = MarConfig.from_pretrained(folder)
        try:
            with suppress(OSError):
                generation = GenerationConfig.from_pretrained(folder)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{Path(folder) / 'generation_config.json'} is damaged ({error}); restore it.") from error
    return EngineModel(engine, config, generation), tokenizer
