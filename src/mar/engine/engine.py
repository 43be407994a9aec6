"""`Engine`: a packed MAR model behind a few calls; numpy and the native core only, torch is never imported.

Does: prefill, steps of one sequence or many, states that are copied, saved and restored, sampling, scoring, counters.
Does not: tokenise or know about chat templates (mar.generate does).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mar.engine.pack import open_packed, pack_settings, packed_file

try:
    _native: Any = importlib.import_module("mar._native")
except ImportError as error:
    if "MAR_ISA" in str(error):
        raise ValueError(str(error)) from error
    raise ImportError(
        "mar was installed without its native core, which mar.engine needs; install g++ or clang and reinstall mar."
    ) from error

State = _native.State
"""What a sequence has left behind: constant in size, whatever its length. `copy()` forks it; `tokens` counts."""

SITES = ("in_proj", "out_proj", "gate_up", "down_proj")
SCORE_BLOCK = 256
"""Tokens whose logits are held at a time while a text is scored."""

MOST_THREADS = 256

MOST_TOKENS = 1 << 53
"""Of a state that is loaded; no text is as long."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""Temperatures below it are 0 in fp32 arithmetic."""


class Engine:
    """A MAR model on the native core.

    Not safe for calls from several threads on the same State; on different states calls take turns. `crossover` says
    for each of SITES and the head above which share of codes not zero its linears in int4 are read whole, not by rows
    (1 in other precisions): measured when the engine is made. Only speed and the counters' rows and bytes hang on it,
    no result.
    """

    def __init__(self, packed: Path, threads: int | None = None, share: bool = False):
        header, arrays = open_packed(packed, share)
        self.settings: dict[str, Any] = header["settings"]
        self.packed = packed
        self.threads = min(len(os.sched_getaffinity(0)), MOST_THREADS) if threads is None else threads
        if type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads is {self.threads!r}; use 1 to {MOST_THREADS}.")
        self._source = str(header.get("source"))
        self._model = _native.Model(self.settings, arrays, self.threads)
        self.crossover: dict[str, float] = dict(zip((*SITES, "head"), self._model.crossovers, strict=True))
        self.vocab_size: int = self.settings["vocab_size"]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        precision: str | None = None,
        head: str | None = None,
        neurons: bool = True,
        threads: int | None = None,
        cache: str | Path | None = None,
        share: bool = False,
    ) -> Engine:
        """A MAR folder's model; packed on first use into a file in the user's cache folder (or `cache`).

        precision: of the decoder's linears, `fp32`, `bf16`, `int8` or `int4`; None for what a compact folder holds, and
        for int8 of any other. head: of embedding and head, one of these or `int4+int8` (int8 in two steps, for single
        tokens); None for the linears', or for a compact folder's own where its linears are of that precision, in two
        steps where that is int8. neurons: False runs the same weights dense: not the dense model they came from, as
        training and budgets have changed them. threads: None takes the cores this process may use. share: map the
        packed file, so that several processes hold its weights once; else, where the system has large pages, each
        reads them into its own, from which they come faster.
        Raises FileNotFoundError or ValueError, in one sentence, for what is no MAR folder or cannot be run.
        """
        settings = pack_settings(Path(folder), precision, head, neurons, _native.PANEL)
        return cls(packed_file(Path(folder), settings, None if cache is None else Path(cache)), threads, share)

    def new_state(self) -> State:
        """The state before any token."""
        return self._model.new_state()

    def prefill(self, state: State, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Read tokens; returns the logits (vocab,) after the last. Raises ValueError for none and for unknown ones."""
        return self._forward([state], ids, False)[0]

    def step(self, state: State, token: int) -> NDArray[np.float32]:
        """Read one token; returns the logits (vocab,) after it."""
        return self._forward([state], [token], False)[0]

    def step_batch(self, states: Sequence[State], tokens: Sequence[int]) -> NDArray[np.float32]:
        """One token for each of several sequences; returns logits (len(states), vocab)."""
        if len(states) != len(tokens):
            raise ValueError(f"{len(states)} states do not go with {len(tokens)} tokens; give one token for each.")
        return self._forward(list(states), tokens, len(states) > 1)

    def logits(self, state: State, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Logits (len(ids), vocab) after every token."""
        return self._forward([state], ids, True)

    def _forward(self, states: list[State], ids: Sequence[int] | NDArray[Any], every: bool) -> NDArray[np.float32]:
        tokens = self._tokens(ids)
        out = np.empty((len(tokens) if every else 1, self._model.outputs), np.float32)
        self._model.forward(states, tokens, every, out)
        return out[:, : self.vocab_size]

    def _tokens(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
        """Token ids as the native model takes them. Raises ValueError for other shapes, and for what is no id."""
        found = np.asarray(ids)
        if found.ndim != 1:
            raise ValueError(f"ids have shape {found.shape}; give one sequence, or several to `step_batch`.")
        if found.size and (found.dtype.kind not in "iu" or not 0 <= found.min() <= found.max() < self.vocab_size):
            wrong = next(one for one in found.tolist() if type(one) is not int or not 0 <= one < self.vocab_size)
            raise ValueError(f"Token {wrong!r} is not in the vocabulary; use integers from 0 to {self.vocab_size - 1}.")
        return np.ascontiguousarray(found, np.int32)

    def step_codes(
        self, state: State, token: int, codes: NDArray[np.int8] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """As `step`, with the codes of all neurons. `codes` are used in place of those, such as what torch took.

        Then each neuron's code is what it makes of the input that the given codes before it lead to. Codes are int8
        (layers * (2 hidden + inner + ffn),), layer by layer and site by site, zeros where a site has no neuron.
        """
        taken = np.zeros(self._model.code_count, np.int8)
        out = np.empty((1, self._model.outputs), np.float32)
        self._model.step_codes(state, int(self._tokens([token])[0]), codes, taken, out)
        return out[0, : self.vocab_size], taken

    def score(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Log-probabilities (len(ids) - 1,) of each token but the first, given those before it."""
        tokens = self._tokens(ids)
        state, scores = self.new_state(), []
        for start in range(0, len(tokens) - 1, SCORE_BLOCK):
            block = tokens[start : min(start + SCORE_BLOCK, len(tokens) - 1)]
            wanted = tokens[start + 1 : start + 1 + len(block)]
            logits = self.logits(state, block)
            scores.append(logits[np.arange(len(block)), wanted] - log_sum_exp(logits))
        return np.concatenate(scores) if scores else np.empty(0, np.float32)

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Iterable[int] = (),
        seed: int | None = None,
        state: State | None = None,
    ) -> Iterator[int]:
        """Tokens that continue `ids`, one by one; temperature 0 takes the likeliest.

        state: to go on from, an earlier call's. The last token given out is not yet in it: it is read with the next
        call's `ids`.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; use 0 or more.")
        random, ends = np.random.default_rng(seed), set(stop)
        state = self.new_state() if state is None else state
        logits = self.prefill(state, ids)
        for count in range(max_new_tokens):
            token = sample(logits, temperature, top_p, top_k, random)
            yield token
            if token in ends or count + 1 == max_new_tokens:
                return
            logits = self.step(state, token)

    def generate(self, ids: Sequence[int], max_new_tokens: int, **sampling: Any) -> list[int]:
        """The tokens of `stream`, at once."""
        return list(self.stream(ids, max_new_tokens, **sampling))

    def save_state(self, state: State, file: str | Path) -> None:
        """Write a state, so that a prompt that was read once need not be read again."""
        with open(file, "wb") as to:
            parts = {"conv": state.conv(), "ssm": state.ssm(), "window": state.window()}
            np.savez(to, **parts, tokens=np.int64(state.tokens), model=self._source)

    def load_state(self, file: str | Path) -> State:
        """A state that `save_state` wrote. Raises ValueError where it is damaged or another model's."""
        with open(file, "rb") as source:
            try:
                found = np.load(source, allow_pickle=False)
                parts = {name: found[name] for name in ("conv", "ssm", "window", "tokens", "model")}
                tokens, model = parts["tokens"][()], str(parts["model"])
            except Exception as error:  # damage shows as errors of zipfile, zlib and numpy
                raise ValueError(f"{file} holds no state ({error}); save it again.") from error
        if model != self._source:
            raise ValueError(f"{file} holds the state of another model; use it with that model.")
        counted = isinstance(tokens, np.integer) and 0 <= tokens <= MOST_TOKENS
        state = self.new_state()
        for name, to in (("conv", state.conv()), ("ssm", state.ssm()), ("window", state.window())):
            if parts[name].shape != to.shape or parts[name].dtype != to.dtype:
                raise ValueError(f"{file} holds a state of another shape; save it again.")
            if not np.isfinite(parts[name]).all() or not counted:
                raise ValueError(f"{file} holds a state that no text leaves behind; save it again.")
            to[:] = parts[name]
        state.set_tokens(int(tokens))
        return state

    def reset_counters(self) -> None:
        """Start counting anew."""
        self._model.reset_counts()

    def counters(self) -> dict[str, Any]:
        """What was counted since the last reset, by layer and site.

        tokens: read so far. sites: a list of {layer, site, spikes, nonzero, rows, bytes}: sum of |code|; codes that are
        not zero; rows of weights read (single tokens: the non-zero ones, filled up to fours, or in int4 all where most
        are; many tokens: every row, once a block); bytes of those weights.
        """
        sites = [
            {
                "layer": index // 4,
                "site": SITES[index % 4],
                "spikes": one[0],
                "nonzero": one[1],
                "rows": one[2],
                "bytes": one[3],
            }
            for index, one in enumerate(self._model.counts())
        ]
        return {"tokens": self._model.counted_tokens(), "sites": sites}


def log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """log sum exp over the last dimension."""
    peak = logits.max(-1, keepdims=True)
    return (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[..., 0]


def sample(
    logits: NDArray[np.float32], temperature: float, top_p: float, top_k: int | None, random: np.random.Generator
) -> int:
    """One token id from logits (vocab,): the likeliest at temperature 0, else drawn among the top k and the top p."""
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k} are no sampling; use temperature from 0, top_p "
            "above 0 and up to 1, top_k from 1."
        )
    if not np.isfinite(logits.max()):
        raise ValueError("The logits are not numbers; the model or its state is damaged, restore it.")
    if temperature == 0:
        return int(logits.argmax())
    # The shift first, and never a division by 0: a very small temperature then gives -inf, not inf - inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(temperature, SMALLEST))
    order = None
    if top_k is not None and top_k < len(scaled):
        order = np.argpartition(-scaled, top_k - 1)[:top_k]
        scaled = scaled[order]
    chances = np.exp(scaled)
    if top_p < 1:
        kept = _likeliest(chances, top_p)
        chances = chances[kept]
        order = kept if order is None else order[kept]
    sums = chances.cumsum(dtype=np.float64)
    drawn = int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
    return drawn if order is None else int(order[drawn])


def _likeliest(chances: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """Places of the fewest chances that have this share of their sum, the largest, which is 1, first."""
    wanted = share * chances.sum(dtype=np.float64)
    places, least = np.flatnonzero(chances == 1), 1.0
    # Few are large: that is a look at all and a sort of some, where a sort of all takes longer than the model.
    while chances[places].sum(dtype=np.float64) < wanted and len(places) < len(chances):
        least = least / 16 if least > 1e-30 else 0.0
        places = np.flatnonzero(chances >= least)
    ranks = places[np.argsort(-chances[places], kind="stable")]
    return ranks[: int(np.searchsorted(chances[ranks].cumsum(dtype=np.float64), wanted)) + 1]
