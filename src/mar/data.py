"""Packed rows of tokens out of documents, and documents of token ids that a teacher wrote.

Does: split, shuffle by seed, render chats, tokenise and pack without padding, and remember the exact position.
Does not: read files or the hub (mar.sources), write text (mar.generate), or move rows to a device.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mar.sources import DataConfig, Document, check_text, first_line, open_source, shuffled

_TOKENISE = 256  # documents a call: enough to keep all cores busy, small enough that a resume wastes little
_ROW_GROUP = 1024  # documents of a written file that are read as one block


@dataclass(frozen=True)
class _Place:
    """The first token that no row has taken: `offset` in a document of a window; `rows` came before it."""

    epoch: int = 0
    group: int = 0
    taken: int = 0
    document: int = 0
    offset: int = 0
    rows: int = 0


class PackedRows:
    """Rows of exactly L tokens, cut out of documents that stand one after the other, each followed by EOS.

    A row is {"input_ids": (L,), "document_ids": (L,)}, both int64; document_ids count from 0 in each row. A document
    that does not fit goes on in the next row, where a model starts it with a fresh state. Nothing is padded or lost,
    except less than a row at the very end when `epochs` is finite.

    Iterating goes on where it stopped, over epochs for ever, or `epochs` times and then from the start again. The
    position consists of numbers only: the place of the first token that is not yet in a row. Loading it reads and
    tokenises that place again, hence the rows that follow are bit-identical however often a run was stopped.

    vocab_size: bound for ready-made token ids; by default the tokenizer's size.
    Raises ValueError for data that gives no row, OSError for data that cannot be reached.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        epochs: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token to end a document with; set tokenizer.eos_token.")
        self.config, self._tokenizer, self._epochs = config, tokenizer, epochs
        self._source = open_source(config)
        self._rank, self._world = 0, 1
        self._vocab_size = vocab_size or len(tokenizer)
        settings = {**asdict(config), "source": self._source.identity, "tokenizer": len(tokenizer)}
        self._fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.rewind()

    @property
    def length(self) -> int:
        """Tokens of a row (L)."""
        return self.config.length

    def shard(self, rank: int, world: int) -> None:
        """From now on give out row i of the stream only where i modulo `world` is `rank`.

        All ranks give out equally many rows and are at the same position after each of them.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not among {world} processes; use 0 to {world - 1}.")
        self._rank, self._world, self._stream = rank, world, None

    def rewind(self) -> None:
        """Go back to the first row."""
        self._place = _Place()
        self._stream: Iterator[tuple[_Place, dict[str, Tensor]]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row that was given out; plain numbers and strings, fit for JSON."""
        return {"fingerprint": self._fingerprint, **asdict(self._place)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position from `state_dict` of the same data. Raises ValueError if files or settings are others."""
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "the saved position belongs to other data; give the files and data settings of that run, or start a "
                "new one."
            )
        self._place = _Place(**{field.name: int(state[field.name]) for field in fields(_Place)})
        self._stream = None

    def __iter__(self) -> PackedRows:
        return self

    def __next__(self) -> dict[str, Int[Tensor, "length"]]:
        if self._stream is None:
            self._stream = self._rows()
        try:
            self._place, row = next(self._stream)
        except StopIteration:
            self.rewind()
            raise
        except BaseException:
            self._stream = None  # a broken generator would look like the end of the data next time
            raise
        return row

    def batches(self, batch_size: int) -> Iterator[dict[str, Int[Tensor, "batch length"]]]:
        """The rows from here on, stacked `batch_size` at a time; only the last batch of finite data may be smaller."""
        while rows := list(islice(self, batch_size)):
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            if len(rows) < batch_size:
                return

    def _rows(self) -> Iterator[tuple[_Place, dict[str, Tensor]]]:
        length, given = self.config.length, self._place.rows
        tokens, documents, row = [], [], {}
        for place, ids in self._documents(self._place):
            offset, number = place.offset, documents[-1] + 1 if documents else 0
            while offset < len(ids):
                step = min(length - len(tokens), len(ids) - offset)
                tokens += ids[offset : offset + step]
                documents += [number] * step
                offset += step
                if len(tokens) == length:
                    if given % self._world == self._rank:
                        row = {"input_ids": torch.tensor(tokens), "document_ids": torch.tensor(documents)}
                    given += 1
                    if given % self._world == 0:
                        yield replace(place, offset=offset, rows=given), row
                    tokens, documents, number = [], [], 0
        if given < self._world:
            raise ValueError(
                f"the data gives only {given * length + len(tokens)} tokens, too few for {self._world} x {length}; "
                "give more text or a smaller data.length (of `mar eval` --window)."
            )

    def _documents(self, start: _Place) -> Iterator[tuple[_Place, list[int]]]:
        """Token ids of all documents from `start` on, each with its place."""
        for epoch in count(start.epoch) if self._epochs is None else range(start.epoch, self._epochs):
            place = start if epoch == start.epoch else _Place(epoch=epoch)
            empty = place.group == place.taken == 0
            for group, taken, found in self._source.windows(epoch, place.group, place.taken):
                resumed = (group, taken) == (start.group, start.taken) and epoch == start.epoch
                kept = [document for document in found if _belongs(document, self.config)]
                order = shuffled(len(kept), self.config, epoch, group, taken)
                first = start.document if resumed else 0
                for low in range(first, len(kept), _TOKENISE):
                    encoded = self._encode([kept[index] for index in order[low : low + _TOKENISE]])
                    for index, ids in enumerate(encoded, start=low):
                        offset = start.offset if resumed and index == first else 0
                        yield _Place(epoch, group, taken, index, offset), ids
                empty = empty and not kept
            if empty:
                raise ValueError(
                    f"{self.config.source} holds no document that is not empty in split {self.config.split!r}; give "
                    "text, or in a recipe another data.field or data.split."
                )

    def _encode(self, documents: list[Document]) -> list[list[int]]:
        """Token ids of each document, ending with EOS exactly once."""
        encoded: list[Any] = [document.content for document in documents]
        for kind in ("text", "chat"):
            places = [index for index, document in enumerate(documents) if document.kind == kind]
            texts = [encoded[index] for index in places]
            # a chat template writes BOS itself; for text it is the tokenizer's own business
            ids = self._tokenise(texts, True) if kind == "text" else self._tokenise(self._render(texts), False)
            for index, found in zip(places, ids, strict=True):
                encoded[index] = found
        eos = self._tokenizer.eos_token_id
        for document, ids in zip(documents, encoded, strict=True):
            if document.kind == "tokens" and (min(ids) < 0 or max(ids) >= self._vocab_size):
                raise ValueError(
                    f"token ids run from {min(ids)} to {max(ids)}, but the vocabulary has {self._vocab_size} entries; "
                    "use the tokenizer that wrote them."
                )
        ended: list[Any] = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded]
        return ended

    def _tokenise(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        for text in texts:
            check_text(text)
        options: Any = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        found: Any = self._tokenizer(texts, **options)
        return found["input_ids"]

    def _render(self, chats: list[Any]) -> list[str]:
        if not chats:
            return []
        if not self._tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which chats need; set tokenizer.chat_template, or data.field to a "
                "column of plain text."
            )
        try:
            rendered: Any = self._tokenizer.apply_chat_template(chats, tokenize=False)
        except Exception as error:  # a template raises what it likes, e.g. when roles do not alternate
            raise ValueError(
                f"the tokenizer's chat template refuses a chat ({first_line(error)}); clean the data or set another "
                "tokenizer.chat_template."
            ) from error
        return [text.rstrip() for text in rendered]


def _belongs(document: Document, config: DataConfig) -> bool:
    """Whether a document is on the configured side of the split; copies of it always are on the same side."""
    if config.split == "all":
        return True
    content = document.content if document.kind == "text" else json.dumps(document.content)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) < config.held_out_share * 2**64) == (config.split == "held_out")


def write_documents(path: Path, documents: Sequence[Int[Tensor, "_"]], meta: Mapping[str, Any]) -> None:
    """Save token ids as a parquet file with the column `tokens`, which any `DataConfig.source` can name.

    meta (JSON values: who wrote it, from which prompts) comes back from `read_meta`. The file appears complete or not
    at all. Raises ValueError for another file name, OSError if it cannot be written.
    """
    if path.suffix != ".parquet":
        raise ValueError(f"{path} must end with .parquet; documents of token ids are kept in that format.")
    tokens = pa.array([document.tolist() for document in documents], type=pa.list_(pa.int32()))
    table = pa.table({"tokens": tokens}).replace_schema_metadata({"mar": json.dumps(dict(meta))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        draft = Path(work) / path.name
        pq.write_table(table, draft, compression="zstd", row_group_size=_ROW_GROUP)
        draft.replace(path)


def read_meta(path: Path) -> dict[str, Any]:
    """What `write_documents` was told about the documents in a file; empty for a parquet file of other origin."""
    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(b"mar", b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({first_line(error)}); remove it and make it again."
        ) from error
