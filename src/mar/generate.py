"""Text from a model, one token or many rows at a time: sample, stream, chat, and a teacher that writes its own text.

Does: sample exactly from logits, keep a sequence's cache between calls, decode a batch of documents at full speed. Does
not: load models, store what was written (mar.data), or measure it. Token ids in, token ids out; only `Session` and
`write_text` take text, because only they need the chat template.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mar.adapter import EngineCache, EngineModel, one_torch_thread
from mar.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mar.kernels.paged import Pages, Prompt, read_prompt
from mar.model import MarCache, MarForCausalLM
from mar.processes import noted_interrupts
from mar.sources import check_text

SAMPLED_ROWS = 16
"""Rows sampled at once: their probabilities over a large vocabulary then stay in the cache of a core."""

BLOCK = 256
"""Vocabulary entries summed before the draw looks inside them."""

READ_TOKENS = 1024
"""Tokens of a long input read per forward, so that activations need constant memory."""


def sample(
    logits: Float[Tensor, "rows vocab"],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " rows"]:
    """One token a row: exactly from softmax(logits) at the defaults, the likeliest token at temperature 0.

    top_k keeps the k likeliest tokens, top_p then the fewest that hold this share of the probability. Raises ValueError
    for settings out of range and for logits that are not finite.
    """
    _check_sampling(temperature, top_p, top_k)
    if temperature == 0:
        best, tokens = logits.max(-1)
        _check_finite(best)
        return tokens
    parts = logits.split(SAMPLED_ROWS)
    return torch.cat([_draw(_probabilities(part, temperature, top_p, top_k), generator) for part in parts])


def _check_sampling(temperature: float, top_p: float, top_k: int | None) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; use 0 for the likeliest token or a number above 0.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; use a share above 0 and at most 1.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; use at least 1, or leave it out to keep all tokens.")


def _check_finite(value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError("The model's logits are not finite; look for NaN or infinite weights in its checkpoint.")


def _probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """fp32 probabilities (rows, vocab), not normalised again after top_p."""
    if temperature != 1:
        # The shift first: a very small temperature then gives -inf, never inf - inf.
        smallest = torch.finfo(torch.float32).tiny
        logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(temperature, smallest)
    if top_k is not None and top_k < logits.shape[-1]:
        values, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, kept, values)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    if top_p < 1:
        ordered, tokens = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter_(-1, tokens, ordered.masked_fill(before >= top_p, 0))
    return probabilities


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Inverse-CDF draw in two levels: a block of the vocabulary, then a token in it.

    One uniform number a row, and sums in fp64 that leave no token out for being rare. torch.multinomial draws one
    exponential number for each of the vocabulary's entries, which takes longer than the model itself.
    """
    blocks = F.pad(probabilities, (0, -probabilities.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)
    _check_finite(ends[:, -1])
    uniform = torch.rand(len(ends), 1, dtype=torch.float64, generator=generator).to(ends.device)
    # Strictly below the total, so that the search ends at an entry that is not zero.
    below = 1 - 2**-52
    target = uniform * below * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)
    rest = target - F.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double().cumsum(-1)
    token = torch.searchsorted(inside, torch.minimum(rest, inside[:, -1:] * below), right=True)
    return (block * BLOCK + token)[:, 0]


class TokenStream:
    """A token sequence that can be fed and continued in turns; the model's cache is kept, so nothing is read twice.

    A MAR model needs the same memory at any length; a LLaMA's cache grows. Every token that `generate` yields belongs
    to the sequence, the stop token too. seed: of the sampling over all turns; None takes a fresh one.
    """

    def __init__(self, model: PreTrainedModel, seed: int | None = None):
        self.model = model
        config: Any = model.config
        self.cache: Cache | EngineCache
        if isinstance(model, EngineModel):
            self.cache = model.new_cache()
        else:
            self.cache = MarCache(config) if isinstance(model, MarForCausalLM) else DynamicCache(config=config)
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._unread: list[int] = []
        self._logits: Tensor | None = None

    def feed(self, ids: Iterable[int]) -> None:
        """Append tokens; they are read when the next token is wanted. Raises ValueError for an unknown token id."""
        ids = list(ids)
        size = self.model.config.vocab_size
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise ValueError(
                f"Token id {wrong[0]} is not in the model's vocabulary of {size}; use the tokenizer of the same model."
            )
        self._unread += ids

    def generate(
        self,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Iterable[int] | None = None,
    ) -> Iterator[int]:
        """Sampled tokens until `max_new_tokens` or a token of `stop` (default: the model's end of text), which ends it.

        May be left early and taken up again. Raises ValueError where nothing was fed and for settings out of range.
        """
        _check_sampling(temperature, top_p, top_k)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; use 0 or more.")
        if self._logits is None and not self._unread:
            raise ValueError("The prompt has 0 tokens; give at least one token to continue from.")
        ends = stop_ids(self.model) if stop is None else set(stop)
        return self._generate(max_new_tokens, temperature, top_p, top_k, ends)

    def _generate(
        self, count: int, temperature: float, top_p: float, top_k: int | None, ends: set[int]
    ) -> Iterator[int]:
        for _ in range(count):
            with one_torch_thread() if isinstance(self.model, EngineModel) else nullcontext():
                token = int(sample(self._read(), temperature, top_p, top_k, self.generator))
            self._unread.append(token)
            yield token
            if token in ends:
                return

    @torch.no_grad()
    def _read(self) -> Tensor:
        """Logits (1, V) after all tokens so far."""
        while self._unread:
            ids = torch.tensor([self._unread[:READ_TOKENS]], device=self.model.device)
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self._logits = output.logits[:, -1]
            del self._unread[:READ_TOKENS]
        assert self._logits is not None
        return self._logits


def stream(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "rows length"],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Iterable[int] | None = None,
    seed: int | None = None,
    state: TokenStream | None = None,
) -> Iterator[int]:
    """Continue `input_ids`, token by token (see TokenStream.generate); `state` continues an earlier call's sequence.

    Raises ValueError for an empty prompt, more than one row, unknown token ids and settings out of range.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; a stream continues one row, (1, length).")
    if state is not None and seed is not None:
        raise ValueError("The state has its own random numbers; give the seed to its TokenStream, not to stream.")
    tokens = TokenStream(model, seed) if state is None else state
    tokens.feed(input_ids[0].tolist())
    return tokens.generate(max_new_tokens, temperature, top_p, top_k, stop)


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text, from the generation config or else the config; empty if neither names one."""
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return {ends} if isinstance(ends, int) else set(ends)
    return set()


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Int[Tensor, "1 length"]:
    """Token ids of a prompt: as a user's turn where the tokenizer has a chat template, else as it is."""
    check_text(prompt)
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt").input_ids.long()
    return _ids(tokenizer, _render(tokenizer, [{"role": "user", "content": prompt}]))


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.long()


class Session:
    """A conversation in text; the state is kept over turns, so a reply costs its own tokens only.

    Without a chat template each text simply follows what was said before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.tokens = TokenStream(model, seed)
        self.sampling = (temperature, top_p, top_k)
        self._last: int | None = None

    def reply(self, text: str, max_new_tokens: int = 256) -> Iterator[str]:
        """Pieces of the answer to `text` as they are written; joined, they are the whole answer."""
        ids = prompt_ids(self.tokenizer, text) if self._last is None else self._turn_ids(text)
        self.tokens.feed(ids[0].tolist())
        return self._pieces(self.tokens.generate(max_new_tokens, *self.sampling))

    def _turn_ids(self, text: str) -> Tensor:
        """What follows an answer: its end, if the model did not write that itself, and the user's next turn."""
        check_text(text)
        if not self.tokenizer.chat_template:
            return _ids(self.tokenizer, text)
        answer = "ANSWER"
        turns = (("user", "?"), ("assistant", answer), ("user", text))
        rendered = _render(self.tokenizer, [{"role": role, "content": content} for role, content in turns])
        _, found, following = rendered.partition(answer)
        if not found:
            raise ValueError(
                "The chat template leaves out the assistant's turns, so a conversation cannot go on; begin a new one "
                "for each turn, or set another tokenizer.chat_template."
            )
        ids = _ids(self.tokenizer, following)
        return ids[:, 1:] if ids.shape[1] and int(ids[0, 0]) == self._last else ids

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        written: list[int] = []
        shown = ""
        for token in tokens:
            self._last = token
            written.append(token)
            text = str(self.tokenizer.decode(written, skip_special_tokens=True))
            # A character of several bytes may be spread over tokens; its first part decodes to the replacement sign.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        yield str(self.tokenizer.decode(written, skip_special_tokens=True))[len(shown) :]


@dataclass(frozen=True)
class Draft:
    """The folder of an interrupted text, and the settings (JSON values) that a call must share to go on with it."""

    folder: Path
    settings: dict[str, Any]

    def load(self) -> Checkpoint | None:
        """What was kept; None where nothing was, or of other settings."""
        found = load_checkpoint(self.folder)
        return found if found and found.state["settings"] == json.loads(json.dumps(self.settings)) else None

    def save(self, tokens: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Keep a text of so many tokens."""
        save_checkpoint(self.folder, tokens, tensors, {"settings": self.settings, **state}, keep=1)


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    tokens: int,
    length: int = 512,
    batch_size: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    draft: Draft | None = None,
) -> list[Int[Tensor, " length"]]:
    """Documents that a LLaMA model writes itself: prompt, continuation, and the end-of-text token where it came to it.

    tokens: how many to write, prompts included; the last step may go a little over. length: most tokens a document.
    batch_size: documents written side by side, each replaced as it ends. At temperature 1 these are samples of the
    model's own distribution. The prompts are used in turn. Documents come in the order in which they were begun; those
    still open at the end are cut there. Equal arguments give equal documents on the same machine. dtype: of the weights
    to write with; the model given stays as it is (bf16 costs about 0.001 nats per token of KL, and is faster where the
    machine multiplies it faster).
    draft: where to keep what is written at Ctrl-C; the same call then goes on from there, to the same documents.
    Raises ValueError for another architecture, an empty or too long prompt, and settings out of range; with a draft
    KeyboardInterrupt after Ctrl-C, when the draft is kept.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"write_text needs a LLaMA model and got a {type(model).__name__}; give it the teacher.")
    for name, value in {"tokens": tokens, "batch_size": batch_size, "number of prompts": len(prompts)}.items():
        if value < 1:
            raise ValueError(f"The {name} to write text with is {value}; use at least 1.")
    _check_sampling(temperature, 1.0, None)
    openings = [prompt_ids(tokenizer, prompt)[0] for prompt in prompts]
    for prompt, ids in zip(prompts, openings, strict=True):
        if not 0 < len(ids) < length:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {len(ids)} tokens; write_text needs at least 1 and fewer than "
                f"length = {length}."
            )
    if model.dtype != dtype:
        model = _in_dtype(model, dtype)
    # More slots than whole documents would only cut all of them short.
    slots = min(batch_size, -(-tokens // length))
    generator = torch.Generator().manual_seed(seed)
    ends = stop_ids(model)
    read: dict[int, Prompt] = {}
    pages = Pages(model, slots, length)
    documents: list[list[int]] = []

    def begin(slot: int) -> int:
        number = len(documents) % len(openings)
        if number not in read:
            read[number] = read_prompt(model, openings[number])
        pages.admit(slot, read[number])
        first = sample(read[number].logits, temperature, generator=generator)
        documents.append([*openings[number].tolist(), int(first)])
        return len(documents) - 1

    with noted_interrupts() if draft else nullcontext() as interrupted, _token_bar(tokens, progress) as advance:
        if (found := draft and draft.load()) is None:
            held = [begin(slot) for slot in range(slots)]
        else:
            pages.restore(found.tensors["pages"], found.state["pages"])
            generator.set_state(found.tensors["generator"]["state"])
            documents += found.state["documents"]
            held = found.state["held"]
        total = sum(map(len, documents))
        while True:
            for slot in range(slots):
                while total < tokens and (documents[held[slot]][-1] in ends or len(documents[held[slot]]) == length):
                    held[slot] = begin(slot)
                    total += len(documents[-1])
            advance(total)
            if draft and interrupted and interrupted.is_set():
                tensors, state = pages.state()
                state = {"pages": state, "documents": documents, "held": held}
                draft.save(total, {"pages": tensors, "generator": {"state": generator.get_state()}}, state)
                raise KeyboardInterrupt(f"Stopped after {total:,} of {tokens:,} tokens; run again to go on from there.")
            if total >= tokens:
                return [torch.tensor(document) for document in documents]
            logits = pages.step([documents[number][-1] for number in held])
            for number, token in zip(held, sample(logits, temperature, generator=generator).tolist(), strict=True):
                documents[number].append(token)
            total += slots


def _in_dtype(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A copy with other weights. Not by Module.to, which would round the frequencies of the rotary embedding too."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def _token_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,} tokens"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown, redirect_stdout=False) as bar:
        task = bar.add_task("writing text", total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
