"""Paged attention for decoding many LLaMA documents at once; a document keeps its keys and values in pages of its own.

Does: read prompts, hold the pages, run the model one token further for all documents. Does not: sample, or decide when
a document ends (mar.generate).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM

PAGE = 64
"""Tokens per page."""


class Prompt(NamedTuple):
    """What a model made of a prompt: keys (layers, pages, heads, size, PAGE), values (layers, pages, heads, PAGE, size)
    and the logits (1, V) after it."""

    length: int
    keys: Tensor
    values: Tensor
    logits: Tensor


def read_prompt(model: LlamaForCausalLM, ids: Int[Tensor, " length"]) -> Prompt:
    """Run the model over one prompt of at least one token."""
    cache = DynamicCache(config=model.config)
    ids = ids[None].to(model.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    length = ids.shape[1]
    layers: list[Any] = cache.layers
    keys, values = (
        F.pad(torch.cat(states), (0, 0, 0, -length % PAGE)).unflatten(2, (-1, PAGE)).transpose(1, 2)
        for states in ([layer.keys for layer in layers], [layer.values for layer in layers])
    )
    return Prompt(length, keys.transpose(-1, -2), values, logits)


class Pages:
    """Keys and values of the open documents, in pages of PAGE tokens that belong to one document each.

    A page is a contiguous matrix per head, so one batched product over the pages in use attends for all documents at
    their own lengths: nothing is copied as they grow (transformers' DynamicCache copies all of it at every token), no
    key head is repeated, and a new document takes over a finished one's pages at once.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        config = model.config
        attention: Any = model.model.layers[0].self_attn
        count = slots * -(-length // PAGE)
        shape = (config.num_hidden_layers, count, cast(int, config.num_key_value_heads))
        size = attention.head_dim
        weight = model.lm_head.weight
        # Left empty: only the pages that come into use take memory.
        self.keys = torch.empty(*shape, size, PAGE, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty(*shape, PAGE, size, dtype=weight.dtype, device=weight.device)
        self.model = model
        # A heap, lowest first: the pages in use stay together at the front.
        self.free = list(range(count))
        self.owned: list[list[int]] = [[] for _ in range(slots)]
        self.lengths = [0] * slots

    def admit(self, slot: int, prompt: Prompt) -> None:
        """Give a slot to a new document that starts with a prompt."""
        for page in self.owned[slot]:
            heapq.heappush(self.free, page)
        self.owned[slot] = []
        for number in range(prompt.keys.shape[1]):
            page = self._grow(slot)
            self.keys[:, page] = prompt.keys[:, number]
            self.values[:, page] = prompt.values[:, number]
        self.lengths[slot] = prompt.length

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The pages in use and, as JSON values, whose they are: for `restore`."""
        used = 1 + max(map(max, self.owned))
        tensors = {"keys": self.keys[:, :used], "values": self.values[:, :used]}
        return tensors, {"owned": self.owned, "lengths": self.lengths}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to what `state` gave, of as many slots and as long documents."""
        used = tensors["keys"].shape[1]
        self.keys[:, :used] = tensors["keys"]
        self.values[:, :used] = tensors["values"]
        self.owned, self.lengths = state["owned"], state["lengths"]
        taken = {page for pages in self.owned for page in pages}
        self.free = [page for page in range(self.keys.shape[1]) if page not in taken]

    def step(self, tokens: list[int]) -> Float[Tensor, "slots vocab"]:
        """Append one token to each document; logits (slots, V) after it."""
        device = self.keys.device
        positions = torch.tensor(self.lengths, device=device)
        for slot, length in enumerate(self.lengths):
            if length == PAGE * len(self.owned[slot]):
                page = self._grow(slot)
                # Attention weighs the rest of a page with 0, and 0 * NaN would be NaN.
                self.keys[:, page] = 0
                self.values[:, page] = 0
            self.lengths[slot] += 1
        self._arrange(positions)
        with _attention(self.model, "mar_pages"):
            output = self.model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                position_ids=positions[:, None],
                use_cache=False,
                pages=self,
            )
        return output.logits[:, -1]

    def _grow(self, slot: int) -> int:
        page = heapq.heappop(self.free)
        self.owned[slot].append(page)
        return page

    def _arrange(self, positions: Tensor) -> None:
        """Index tensors of this step, the same for all layers. positions: (slots,) of the new tokens."""
        slots, device = len(self.owned), positions.device
        most = max(map(len, self.owned))
        used = 1 + max(map(max, self.owned))
        self.table = torch.tensor([pages + [0] * (most - len(pages)) for pages in self.owned], device=device)
        held = torch.arange(most, device=device) <= positions[:, None] // PAGE
        rows, columns = held.nonzero(as_tuple=True)
        # A free page among those in use is computed for the last slot, and what comes of it goes to row `slots`.
        self.owner = torch.full((used,), slots, device=device)
        self.owner[self.table[rows, columns]] = rows
        self.asker = self.owner.clamp(max=slots - 1)
        self.place = torch.zeros(used, dtype=torch.long, device=device)
        self.place[self.table[rows, columns]] = rows * most + columns
        self.page = self.table.gather(1, positions[:, None] // PAGE)[:, 0]
        self.offset = positions % PAGE
        late = torch.arange(most * PAGE, device=device) > positions[:, None]
        self.bias = torch.zeros(late.shape, dtype=self.keys.dtype, device=device).masked_fill_(late, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the new tokens' key and value, (b, heads, 1, size); attend with the query: (b, 1, queries * size).

        The query heads that share a key head are the rows of one product.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[self.page, :, :, self.offset] = key[:, :, 0]
        values[self.page, :, self.offset] = value[:, :, 0]
        used, heads = len(self.owner), keys.shape[1]
        shared = (query * scaling).reshape(len(query), heads, -1, query.shape[-1])
        scores = torch.bmm(shared[self.asker].flatten(0, 1), keys[:used].flatten(0, 1)).unflatten(0, (used, heads))
        by_row = scores[self.table].permute(0, 2, 3, 1, 4).flatten(3)
        weights = by_row.add_(self.bias[:, None, None]).softmax(-1)
        by_page = weights.unflatten(3, (-1, PAGE)).permute(0, 3, 1, 2, 4).flatten(0, 1)[self.place]
        parts = torch.bmm(by_page.flatten(0, 1), values[:used].flatten(0, 1)).unflatten(0, (used, heads))
        sums = torch.zeros(len(query) + 1, *parts.shape[1:], device=parts.device)
        output = sums.index_add_(0, self.owner, parts.float())[:-1]
        return output.to(query.dtype).reshape(len(query), 1, -1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pages: Pages,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface over Pages, which knows each row's length: it takes no mask."""
    return pages.attend(cast(int, module.layer_idx), query, key, value, scaling), None


AttentionInterface.register("mar_pages", _attend)


@contextmanager
def _attention(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
