"""What decode and prefill are timed on: our engine, transformers and llama.cpp behind one pair of calls.

Does: read a text up to a length, keep what was read, and time single-token steps from there, again and again. Every
figure includes the logits of the last token as an array; choosing a token is left out for all, since all are given the
text's own next tokens: spikes are those of real text, and every runner reads the same. Does not: compare.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from llama_peer import LlamaPeer
from mar.engine import Engine
from mar.engine.pack import HEADS, TWO_STEP, open_packed
from mar.teachers import load_teacher
from timing import turns

OURS, OFF = "ours", "neurons_off"
TRANSFORMERS = {"transformers_bf16": torch.bfloat16, "transformers_fp32": torch.float32}
DOCS = Path(__file__).parents[1] / "docs"
LARGE = 16
"""Rows of a head in two steps that are read in int8 (kLarge of csrc/model.cpp)."""

SPARE = 256
"""Room after the text read, for the tokens decoded."""


class Runner(Protocol):
    """An implementation, with a state for each length. longest: the context that it can be asked for, None for any."""

    longest: int | None

    def prefill(self, tokens: list[int], threads: int) -> float:
        """Seconds to read tokens from nothing, up to the logits of the last."""
        ...

    def fill(self, tokens: list[int], threads: int) -> None:
        """Reach a state from which to decode after as many tokens as these, by `prefill` or faster."""
        ...

    def decode(self, length: int, tokens: list[int], threads: int) -> list[float]:
        """Seconds of each step after `length` tokens, to which `fill` has come; leaves that state as it is."""
        ...


class EngineRunner:
    """Our engine; one for each number of threads, over the same packed file."""

    def __init__(self, student: Path, precision: str, head: str, neurons: bool, threads: list[int]):
        self.longest: int | None = None
        self.engines = {
            n: Engine.from_pretrained(student, precision=precision, head=head, neurons=neurons, threads=n)
            for n in threads
        }
        self._states: dict[int, Any] = {}

    def prefill(self, tokens: list[int], threads: int) -> float:
        started = time.perf_counter()
        state = self.engines[threads].new_state()
        self.engines[threads].prefill(state, np.array(tokens, np.int32))
        seconds = time.perf_counter() - started
        self._states[len(tokens)] = state
        return seconds

    def fill(self, tokens: list[int], threads: int) -> None:
        self.prefill(tokens, threads)

    def decode(self, length: int, tokens: list[int], threads: int) -> list[float]:
        engine, state = self.engines[threads], self._states[length].copy()
        seconds = []
        for token in tokens:
            started = time.perf_counter()
            engine.step(state, token)
            seconds.append(time.perf_counter() - started)
        return seconds

    def count(self, length: int, tokens: list[int], threads: int) -> dict[str, Any]:
        """What these tokens ask for on average: share of codes that are not zero, bytes of memory that are read.

        Of the linears that spikes feed, the engine counts the bytes; everything else in the packed file, the head above
        all, is read whole, and so is the state. Of a head in two steps that is its int4 part and the rows of its large
        channels; the words that it reads again are not counted.
        """
        engine = self.engines[threads]
        engine.reset_counters()
        self.decode(length, tokens, threads)
        counted = engine.counters()
        sizes = engine.settings
        inner = sizes["num_heads"] * sizes["head_dim"]
        channels = {"out_proj": inner, "down_proj": sizes["intermediate_size"]}
        nonzero, elements = Counter[str](), Counter[str]()
        for site in counted["sites"]:
            if f"{site['site']}.encoder" in sizes:
                nonzero[site["site"]] += site["nonzero"]
                elements[site["site"]] += counted["tokens"] * channels.get(site["site"], sizes["hidden_size"])
        _, arrays = open_packed(engine.packed)
        once = {name: array.nbytes for name, array in arrays.items() if ".stream." not in name}  # int4 has two orders
        linears = {name for name in once if name.startswith("layers.") and name.endswith(".weights")}
        unread = {"embedding", "head.words", *linears}
        if "head.words" in arrays:
            unread.add("head.weights")
        fixed = sum(size for name, size in once.items() if name not in unread)
        if "head.words" in arrays:
            fixed += LARGE * sizes["vocab_size"]
        state = self._states[length]
        return {
            "nonzero_share": nonzero.total() / max(1, elements.total()),
            "nonzero_share_by_site": {site: nonzero[site] / elements[site] for site in elements},
            "linear_bytes_per_token": sum(site["bytes"] for site in counted["sites"]) / counted["tokens"],
            "linear_bytes": sum(once[name] for name in linears),
            "other_bytes_per_token": fixed + state.conv().nbytes + state.ssm().nbytes,
        }


class TransformersRunner:
    """A LLaMA in transformers, eager, with the cache that `generate` uses."""

    def __init__(self, model: LlamaForCausalLM):
        self.model = model
        self.longest: int | None = model.config.max_position_embeddings
        self._caches: dict[int, DynamicCache] = {}

    def prefill(self, tokens: list[int], threads: int) -> float:
        torch.set_num_threads(threads)
        cache = DynamicCache(config=self.model.config)
        started = time.perf_counter()
        self._read(cache, tokens)
        seconds = time.perf_counter() - started
        self._caches[len(tokens)] = cache
        return seconds

    def fill(self, tokens: list[int], threads: int) -> None:
        self.prefill(tokens, threads)

    def decode(self, length: int, tokens: list[int], threads: int) -> list[float]:
        torch.set_num_threads(threads)
        seconds = []
        for token in tokens:
            started = time.perf_counter()
            self._read(self._caches[length], [token])
            seconds.append(time.perf_counter() - started)
        self._caches[length].crop(-len(tokens))
        return seconds

    @torch.inference_mode()
    def _read(self, cache: DynamicCache, tokens: list[int]) -> np.ndarray:
        output = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()


class LlamaRunner:
    """llama.cpp in its own process. ubatch: tokens computed at once; flash: whether attention is fused."""

    def __init__(self, peer: LlamaPeer, ubatch: int = 512, flash: bool = True):
        self.longest: int | None = None
        self.peer, self.ubatch, self.flash = peer, ubatch, flash
        self.opened: dict[int, str] = {}

    def prefill(self, tokens: list[int], threads: int) -> float:
        return self.peer.ask("prefill", name=self._open(len(tokens)), tokens=tokens, threads=threads)

    def fill(self, tokens: list[int], threads: int) -> None:
        self.peer.ask("fill", name=self._open(len(tokens)), tokens=tokens, threads=threads)

    def decode(self, length: int, tokens: list[int], threads: int) -> list[float]:
        return self.peer.ask("decode", name=self.opened[length], start=length, tokens=tokens, threads=threads)

    def close(self) -> None:
        """Give back the memory of all lengths."""
        while self.opened:
            self.peer.ask("close", name=self.opened.popitem()[1])

    def _open(self, length: int) -> str:
        if length not in self.opened:
            name = self.opened[length] = f"{length} of {id(self)}"
            self.peer.ask("open", name=name, length=length + SPARE, ubatch=self.ubatch, flash=self.flash)
        return self.opened[length]

    def fastest(self, ubatches: Sequence[int], time: Callable[[LlamaRunner], float]) -> LlamaRunner:
        """The best of runners with each ubatch, with flash and without, tried twice in turns; it stays open."""
        tries = [LlamaRunner(self.peer, *pair) for pair in product(ubatches, (True, False))]
        seconds = turns({runner: partial(time, runner) for runner in tries}, rounds=2)
        best = min(tries, key=lambda runner: min(seconds[runner]))
        for runner in tries:
            if runner is not best:
                runner.close()
        return best


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what is run, and on which text."""
    parser.add_argument("student", type=Path, help="a spiking student's folder")
    parser.add_argument("--precision", default="int8", help="of the engine's weights")
    parser.add_argument("--head", choices=HEADS, default=TWO_STEP, help="of the engine's embedding and output head")
    parser.add_argument("--teacher", default="smollm2-135m", help="the dense LLaMA that transformers runs")
    parser.add_argument(
        "--teacher-precision", choices=("bf16", "fp32"), default="bf16", help="of it; `mar info` says which is faster"
    )
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--peer-gguf", type=Path, nargs="+", default=[], help="the same LLaMA for llama.cpp")
    parser.add_argument("--text", type=Path, nargs="+", help="plain text; by default the pages of the documentation")


@contextmanager
def started(options: argparse.Namespace) -> Iterator[dict[str, Runner]]:
    """All runners by name; llama.cpp's are called after the quantisation of their file, such as q8_0."""
    if options.peer_gguf and not options.peer_python:
        raise ValueError("--peer-gguf needs --peer-python, a Python that has llama-cpp-python (see llama_peer.py).")
    runners: dict[str, Runner] = {
        name: EngineRunner(options.student, options.precision, options.head, neurons, options.threads)
        for name, neurons in ((OURS, True), (OFF, False))
    }
    with ExitStack() as stack:
        for file in options.peer_gguf:
            peer = stack.enter_context(LlamaPeer(options.peer_python, file))
            runners[peer.info["quantisation"].lower()] = LlamaRunner(peer)
        name = f"transformers_{options.teacher_precision}"
        runners[name] = TransformersRunner(load_teacher(options.teacher, TRANSFORMERS[name]).model)
        yield runners


def text_tokens(files: list[Path] | None, folder: Path, count: int) -> list[int]:
    """The first tokens of the texts by a folder's tokenizer, from the start again where they are too short."""
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files or sorted(DOCS.glob("*.md")))
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return (tokens * (count // len(tokens) + 1))[:count]


def with_best(ratio: dict[str, float]) -> dict[str, float]:
    """Ours over each other runner, and over the fastest file of llama.cpp."""
    llama = [value for name, value in ratio.items() if name not in (OURS, OFF, *TRANSFORMERS)]
    return ratio | ({"best_llama_cpp": min(llama)} if llama else {})


def llama_facts(runners: dict[str, Runner]) -> dict[str, Any]:
    """What llama.cpp says of itself and its files, and the memory that its processes hold."""
    found = {name: runner.peer for name, runner in runners.items() if isinstance(runner, LlamaRunner)}
    return {
        name: peer.info | {"file": peer.file.name, "resident_megabytes": peer.ask("resident_megabytes")}
        for name, peer in found.items()
    }
