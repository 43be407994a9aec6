"""Where documents come from: local files, and hub data sets by streaming.

Does: find the files, read records as documents, and give an epoch's documents in windows whose positions can be named.
Does not: shuffle within a window, tokenise or pack (mar.data), or keep more than one window in memory.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
COLUMNS = ("tokens", "messages", "conversations", "text")
"""Where a document is looked for when no `field` is given, first match first."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SPLITS = ("all", "train", "held_out")
HUB_PRESETS: dict[str, dict[str, str]] = {
    # GenQA keeps its chats in `text`; its nine splits are subjects, so all of them are read.
    "genqa": {"source": "hub:tomg-group-umd/GenQA", "field": "text", "hub_split": "*"},
    "openhermes-2.5": {"source": "hub:teknium/OpenHermes-2.5", "field": "conversations"},
    "infinity-instruct": {"source": "hub:BAAI/Infinity-Instruct", "field": "conversations", "hub_config": "7M"},
}
"""The data sets of the paper, by a short name that can stand as `source`."""

_CHUNK = 1024  # lines of a jsonl file that are read as one block
_STREAMS = 8  # shards of a hub data set that are open at a time


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it.

    source: file, folder or glob (.parquet, .jsonl, .jsonl.gz, .txt), a list of these, `hub:owner/name`, or a preset.
    length: tokens of a row (L). field: column of the document; by default the first of `COLUMNS` that is there. A
    string is text, a list of turns is rendered by the tokenizer's chat template, a list of numbers is token ids.
    prompt_field: text put before the document with a blank line between, where the column is there and not empty.
    shuffle, seed, window: files are mixed in blocks, then `window` documents at a time.
    split: `train` and `held_out` divide the documents by their hash, `held_out_share` of them going to the latter.
    skip, take: leave out the first documents in file order, and use at most so many (local files only).
    hub_config, hub_split: configuration and split of a hub data set (split `train` by default; `*` means all).
    """

    source: str | list[str]
    length: int = 512
    field: str | None = None
    prompt_field: str | None = "prompt"
    shuffle: bool = True
    seed: int = 0
    window: int = 20_000
    split: str = "all"
    held_out_share: float = 0.01
    skip: int = 0
    take: int | None = None
    hub_config: str | None = None
    hub_split: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data.source is empty; give a file, folder, pattern or hub data set.")
        for name, least in (("length", 1), ("window", 1), ("skip", 0), ("take", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}.")
        if self.split not in SPLITS:
            raise ValueError(f"data.split is {self.split!r}; use one of {', '.join(map(repr, SPLITS))}.")
        if self.split != "all" and not 0 < self.held_out_share < 1:
            raise ValueError(f"data.held_out_share is {self.held_out_share}; it must lie between 0 and 1.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DataConfig:
        """The configuration in a mapping, e.g. out of a recipe. Unknown keys raise ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"data settings have unknown keys {unknown}; known are {sorted(known)}.")
        return cls(**settings)


class Document(NamedTuple):
    """One document before tokenising; content is a string (text), a list of turns (chat) or token ids (tokens)."""

    kind: str
    content: Any


def read_document(record: Mapping[str, Any], config: DataConfig, where: str) -> Document | None:
    """The document in one record of a file, or None if it is empty; `where` names the record in errors."""
    value = record[column := find_column(record, config, where)]
    if value is None or isinstance(value, str):
        prompt = record.get(config.prompt_field) if config.prompt_field and config.prompt_field != column else None
        if not (value or "").strip():
            return None
        return Document("text", f"{prompt}\n\n{value}" if prompt else value)
    if isinstance(value, list):
        if not value:
            return None
        if all(isinstance(turn, dict) for turn in value):
            return Document("chat", [_turn(turn, where) for turn in value])
        if all(isinstance(token, int) for token in value):
            return Document("tokens", value)
    raise ValueError(f"{where}: a document must be text, a list of turns or a list of token ids; set data.field.")


def find_column(columns: Iterable[str], config: DataConfig, where: str) -> str:
    """The column that holds the document. Raises ValueError, naming the columns there are, if none does."""
    columns = list(columns)
    wanted = (config.field,) if config.field else COLUMNS
    if found := next((name for name in wanted if name in columns), None):
        return found
    raise ValueError(f"{where} has no column {' or '.join(wanted)}, only {columns}; set data.field to one of them.")


def _turn(turn: dict[str, Any], where: str) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"{where}: a turn needs role and content (or from and value) as text, not {sorted(turn)}; mend it."
        )
    return {"role": ROLES.get(role, role), "content": content}


class _Block(NamedTuple):
    """Records that are read together: a row group, `_CHUNK` lines from a byte offset on, or a whole text file."""

    path: Path
    start: int
    first: int  # number of the block's first record in its file, from 0
    cut: slice  # which of the block's records are used; as indexed, all of them


class LocalFiles:
    """Local files as blocks that can be read in any order."""

    def __init__(self, sources: Sequence[str], config: DataConfig) -> None:
        self._config = config
        paths = [path for source in sources for path in _expand(source)]
        every = [block for path in paths for block in _index(path, config)]
        self._blocks, seen = [], 0
        for block in every:
            size = block.cut.stop
            end = size if config.take is None else min(size, config.skip + config.take - seen)
            cut = slice(max(0, config.skip - seen), end)
            if cut.start < cut.stop:
                self._blocks.append(block._replace(cut=cut))
            seen += size
        if not self._blocks:
            skipped = f" after the {config.skip} skipped ones" if seen else ""
            raise ValueError(f"{', '.join(sources)} holds no documents{skipped}; give other files.")
        self.identity = [[path.name, path.stat().st_size] for path in paths]

    def windows(self, epoch: int, group: int, _taken: int) -> Iterator[tuple[int, int, list[Document]]]:
        """Documents of one epoch from block number `group` on, a window at a time, with the window's position."""
        order = shuffled(len(self._blocks), self._config, epoch)
        while group < len(order):
            start, documents = group, []
            while group < len(order) and len(documents) < self._config.window:
                documents += _read(self._blocks[order[group]], self._config)
                group += 1
            yield start, 0, documents


class HubStream:
    """A data set on the hub (or a local copy in its layout): shards that can only be read from their start."""

    def __init__(self, config: DataConfig) -> None:
        # imported here because it takes a second, and local files do not need it
        from datasets import load_dataset

        self._config, self._name = config, str(config.source).removeprefix("hub:")
        if config.skip or config.take:
            raise ValueError("data.skip and data.take need local files; use data.split for a hub data set.")
        split = config.hub_split or "train"
        try:
            loaded: Any = load_dataset(
                self._name, config.hub_config, split=None if split == "*" else split, streaming=True
            )
        except ValueError as error:
            raise ValueError(
                f"the data set {self._name!r} does not fit data.hub_config {config.hub_config!r} and data.hub_split "
                f"{split!r} ({first_line(error)}); set them to what it has."
            ) from error
        except Exception as error:  # the client raises errors of several libraries, each about the network or the name
            raise OSError(
                f"the data set {self._name!r} cannot be read from the Hugging Face hub ({first_line(error)}); check "
                "its name, your access and the network, or give local files."
            ) from error
        streams = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
        self._shards = [(stream, number) for stream in streams for number in range(stream.num_shards)]
        self.identity = [self._name, len(self._shards)]

    def windows(self, epoch: int, group: int, taken: int) -> Iterator[tuple[int, int, list[Document]]]:
        """Documents of one epoch, from shard number `group` on, of which `taken` records a shard were read before.

        `_STREAMS` shards are read side by side, because neighbours in a shard are alike.
        """
        order = shuffled(len(self._shards), self._config, epoch)
        while group < len(order):
            members = order[group : group + _STREAMS]
            share = -(-self._config.window // len(members))
            readers = [self._records(number, taken) for number in members]
            while found := [document for reader in readers for document in islice(reader, share)]:
                yield group, taken, [document for document in found if document]
                taken += share
            group, taken = group + len(members), 0

    def _records(self, number: int, taken: int) -> Iterator[Document | None]:
        # Not the stream's own state_dict: datasets 5.0 to 5.1 lose it at the second resume (datasets issue 8308).
        stream, shard = self._shards[number]
        for index, record in enumerate(stream.shard(stream.num_shards, shard).skip(taken), start=taken):
            yield read_document(record, self._config, f"{self._name} (shard {number}, record {index})")


def open_source(config: DataConfig) -> LocalFiles | HubStream:
    """The documents that a configuration names. Raises ValueError or FileNotFoundError if there are none."""
    sources = [config.source] if isinstance(config.source, str) else config.source
    if hub := [source for source in sources if source.startswith("hub:") or source in HUB_PRESETS]:
        if len(sources) > 1:
            raise ValueError(f"data.source lists {hub[0]!r} among others; a hub data set must stand alone.")
        preset = HUB_PRESETS.get(hub[0], {"source": hub[0]})
        changes = {key: value for key, value in preset.items() if key == "source" or getattr(config, key) is None}
        return HubStream(replace(config, **changes))
    return LocalFiles(sources, config)


def shuffled(size: int, config: DataConfig, *key: int) -> list[int]:
    """Numbers below `size` in an order that depends on the seed and on `key` only."""
    if not config.shuffle:
        return list(range(size))
    return np.random.default_rng([config.seed, *key]).permutation(size).tolist()


def check_text(text: str) -> None:
    """Raise ValueError for half a surrogate pair, which JSON and a terminal can bring in and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"the text holds {text[error.start]!r} near {near!r}, no Unicode; mend it.") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, to be quoted in ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _kind(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.endswith(kind)), None)


def _expand(source: str) -> list[Path]:
    """The files that one entry of `source` stands for, sorted by name."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{source!r} names no home folder ({error}); give the path in full.") from error
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
        if len(kinds := sorted({str(_kind(file)) for file in paths})) > 1:
            raise ValueError(f"{path} mixes {' and '.join(kinds)} files; give a pattern, e.g. {path / '*'}{kinds[0]}.")
        if not paths:
            raise ValueError(f"{path} holds no {', '.join(KINDS)} file; give another folder.")
        return paths
    paths = [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]
    if not paths:
        raise FileNotFoundError(
            f"there is no {source!r}; give a file, folder or pattern, hub:owner/name, or {', '.join(HUB_PRESETS)}."
        )
    if unknown := next((file for file in paths if not _kind(file)), None):
        raise ValueError(f"{unknown} is of an unknown kind; use {', '.join(KINDS)}.")
    return paths


def _index(path: Path, config: DataConfig) -> list[_Block]:
    """The blocks of a file, without reading its documents."""
    if _kind(path) == ".txt":
        return [_Block(path, 0, 0, slice(0, 1))]
    if _kind(path) == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        find_column(names, config, str(path))
        firsts = np.cumsum([0, *sizes]).tolist()
        return [_Block(path, group, firsts[group], slice(0, size)) for group, size in enumerate(sizes)]
    lines, blocks, offset, first = _lines(path, 0), [], 0, 0
    # a compressed file cannot be entered in the middle, so it is one block
    while sizes := [len(line) for line in islice(lines, _CHUNK if path.suffix == ".jsonl" else None)]:
        blocks.append(_Block(path, offset, first, slice(0, len(sizes))))
        offset, first = offset + sum(sizes), first + len(sizes)
    return blocks


def _read(block: _Block, config: DataConfig) -> list[Document]:
    """The documents of a block that are not empty."""
    path, cut, first = block.path, block.cut, block.first + 1
    if _kind(path) == ".txt":
        try:
            records = [{config.field or "text": path.read_text(encoding="utf-8")}]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); convert it.") from error
    elif _kind(path) == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                wanted = {find_column(names, config, str(path)), config.prompt_field} & set(names)
                table = file.read_row_group(block.start, columns=sorted(wanted))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        records = table.slice(cut.start, cut.stop - cut.start).to_pylist()
    else:
        lines = islice(_lines(path, block.start), cut.start, cut.stop)
        records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, first + cut.start)]
    found = [
        read_document(record, config, f"{path}:{number}")
        for number, record in enumerate(records, first + cut.start)
        if record is not None
    ]
    return [document for document in found if document]


def _lines(path: Path, start: int) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(start)
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    """The record in one line of a jsonl file, or None if the line is blank."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({first_line(error)}); mend or remove that line.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds no JSON object; mend or remove that line.")
    return record


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({first_line(error)}); copy or make it again.")
