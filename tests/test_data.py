import json
import resource
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mar.data import PackedRows, read_meta, write_documents
from mar.sources import DataConfig

EOS = 2


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def some_texts(count: int) -> list[str]:
    """Documents of very different lengths, some of them many rows long."""
    return [f"Document {number}: " + "the river and the town. " * (number * 7 % 11) for number in range(count)]


def as_lists(rows: list[dict[str, Tensor]]) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"].tolist(), row["document_ids"].tolist()) for row in rows]


def documents_in(rows: list[dict[str, Tensor]]) -> list[list[int]]:
    """The token stream of the rows, cut after each EOS."""
    documents: list[list[int]] = [[]]
    for token in torch.cat([row["input_ids"] for row in rows]).tolist():
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    return documents


def test_packing_by_hand(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = [torch.tensor(ids) for ids in ([10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41])]
    write_documents(tmp_path / "a.parquet", documents, {})
    config = DataConfig(str(tmp_path / "a.parquet"), length=4, shuffle=False)
    rows = as_lists(list(PackedRows(config, tiny_tokenizer, epochs=1)))
    assert rows == [
        ([10, 11, 12, EOS], [0, 0, 0, 0]),
        ([20, EOS, 30, 31], [0, 0, 1, 1]),
        ([32, 33, 34, 35], [0, 0, 0, 0]),
        ([EOS, 40, 41, EOS], [0, 1, 1, 1]),
    ]


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(3, 319), min_size=1, max_size=30), min_size=1, max_size=20),
    length=st.integers(1, 40),
)
def test_rows_are_the_documents_one_after_the_other(
    documents: list[list[int]], length: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = [token for document in documents for token in [*document, EOS]]
    ids = [number for number, document in enumerate(documents) for _ in [*document, EOS]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        write_documents(path, [torch.tensor(document) for document in documents], {})
        rows = PackedRows(DataConfig(str(path), length=length, shuffle=False), tiny_tokenizer, epochs=2)
        if 2 * len(stream) < length:
            with pytest.raises(ValueError, match=f"only {2 * len(stream)} tokens"):
                list(rows)
            return
        found = list(rows)
    tokens = torch.cat([row["input_ids"] for row in found]).tolist()
    assert tokens == (stream * 2)[: len(tokens)]
    assert 2 * len(stream) - len(tokens) < length
    numbers = ids + [number + len(documents) for number in ids]
    for start, row in enumerate(found):
        expected = numbers[start * length : (start + 1) * length]
        assert row["document_ids"].tolist() == [number - expected[0] for number in expected]


def test_text_is_tokenised_whole_and_ended_once(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = ["The river rose.", "Ends by itself.<|im_end|>", "", "  \n", "Third, after empty ones."]
    rows = PackedRows(DataConfig(write_texts(tmp_path / "a.jsonl", texts), length=1, shuffle=False), tiny_tokenizer, 1)
    found = documents_in(list(rows))
    assert [tiny_tokenizer.decode(ids) for ids in found] == [
        "The river rose.<|im_end|>",
        "Ends by itself.<|im_end|>",
        "Third, after empty ones.<|im_end|>",
        "",
    ]


def test_chats_are_rendered_by_the_template_and_bos_is_the_tokenizers_business(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + str(tiny_tokenizer.chat_template)
    chat = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "The town."}]
    records: list[dict[str, Any]] = [{"text": "Plain text."}, {"conversations": chat}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(PackedRows(DataConfig(str(path), length=1, shuffle=False), tokenizer, epochs=1))
    ids = torch.cat([row["input_ids"] for row in rows])
    assert tokenizer.decode(ids) == (
        "<|endoftext|>Plain text.<|im_end|>"
        "<|endoftext|><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThe town.<|im_end|>"
    )


def test_every_epoch_has_every_document_once_in_another_order(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = [f"Text {number}." for number in range(40)]
    path = write_texts(tmp_path / "a.jsonl", texts)

    def order(**changes: Any) -> list[str]:
        rows = list(PackedRows(DataConfig(path, length=1, **changes), tiny_tokenizer, epochs=2))
        return [tiny_tokenizer.decode(ids[:-1]) for ids in documents_in(rows)[:-1]]

    found = order()
    assert sorted(found[:40]) == sorted(found[40:]) == sorted(texts)
    assert found[:40] != found[40:]
    assert order() == found
    assert order(seed=1)[:40] != found[:40]
    assert order(shuffle=False) == texts * 2


def local(folder: Path, name: str) -> DataConfig:
    texts = some_texts(60)
    if name == "tokens":
        write_documents(folder / "a.parquet", [torch.arange(3, 4 + number % 50) for number in range(60)], {})
        return DataConfig(str(folder / "a.parquet"), length=24)
    if name == "hub":
        (folder / "copy").mkdir()
        for shard in range(12):
            write_texts(folder / "copy" / f"train-{shard:02}.jsonl", texts[shard * 5 : shard * 5 + 5 - shard % 3])
        return DataConfig(f"hub:{folder / 'copy'}", length=24, window=16)
    for number in range(3):
        write_texts(folder / f"{number}.jsonl", texts[number * 20 : number * 20 + 20])
    window = 10 if name == "small windows" else 20_000
    split = "train" if name == "split" else "all"
    return DataConfig(str(folder), length=24, window=window, split=split, held_out_share=0.3)


@pytest.mark.parametrize("name", ["small windows", "one window", "split", "tokens", "hub"])
def test_resumed_twice_the_rows_are_the_same(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = local(tmp_path, name)
    whole = as_lists(list(islice(PackedRows(config, tiny_tokenizer), 400)))
    first_epoch = len(list(PackedRows(config, tiny_tokenizer, epochs=1)))
    assert 20 < first_epoch < 200  # so that the stops below lie in different epochs, too
    for stops in ((1, 2), (7, 8), (first_epoch - 1, 2), (first_epoch, first_epoch + 1), (30, 2 * first_epoch)):
        found, state = [], None
        for stop in (*stops, 11):
            rows = PackedRows(config, tiny_tokenizer)
            if state is not None:
                rows.load_state_dict(json.loads(state))
            found += as_lists(list(islice(rows, stop)))
            state = json.dumps(rows.state_dict())
        assert found == whole[: len(found)]


def test_any_position_can_be_loaded_into_running_rows(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = PackedRows(local(tmp_path, "small windows"), tiny_tokenizer)
    states, whole = [rows.state_dict()], []
    for row in islice(rows, 60):
        whole.append(row)
        states.append(rows.state_dict())
    for number in (41, 3, 0, 59):
        rows.load_state_dict(states[number])
        assert as_lists([next(rows)]) == as_lists(whole[number : number + 1])
    rows.rewind()
    assert as_lists(list(islice(rows, 60))) == as_lists(whole)


def test_finite_rows_start_again_after_their_end(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = PackedRows(local(tmp_path, "one window"), tiny_tokenizer, epochs=1)
    start, first = rows.state_dict(), list(rows)
    assert rows.state_dict() == start
    assert as_lists(list(rows)) == as_lists(first)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_of_one_process(
    world: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = local(tmp_path, "small windows")
    whole = as_lists(list(PackedRows(config, tiny_tokenizer, epochs=1)))
    ranks = []
    for rank in range(world):
        rows = PackedRows(config, tiny_tokenizer, epochs=1)
        rows.shard(rank, world)
        ranks.append(rows)
    before = as_lists([next(rows) for rows in ranks for _ in range(5)])
    assert before == [row for rank in range(world) for row in whole[rank : 5 * world : world]]
    # the position is that of all ranks, and fits any number of them
    position = ranks[0].state_dict()
    assert all(rows.state_dict() == position for rows in ranks)
    one = PackedRows(config, tiny_tokenizer, epochs=1)
    one.load_state_dict(position)
    assert as_lists(list(one)) == whole[5 * world :]
    after = [as_lists(list(rows)) for rows in ranks]
    full = len(whole) // world * world
    assert after == [whole[5 * world + rank : full : world] for rank in range(world)]
    with pytest.raises(ValueError, match=f"rank {world} is not among"):
        one.shard(world, world)


def test_batches_are_stacked_rows(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = local(tmp_path, "one window")
    whole = list(PackedRows(config, tiny_tokenizer, epochs=1))
    size = next(size for size in (4, 5, 7) if len(whole) % size)
    rows = PackedRows(config, tiny_tokenizer, epochs=1)
    batches = list(rows.batches(size))
    assert [len(batch["input_ids"]) for batch in batches] == [size] * (len(whole) // size) + [len(whole) % size]
    for name in ("input_ids", "document_ids"):
        stacked = torch.cat([batch[name] for batch in batches])
        assert stacked.dtype == torch.int64
        assert torch.equal(stacked, torch.stack([row[name] for row in whole]))
    # a batch counts as seen when it is handed out, not when the next one is asked for
    running = rows.batches(size)
    next(running)
    other = PackedRows(config, tiny_tokenizer, epochs=1)
    other.load_state_dict(rows.state_dict())
    assert as_lists([next(other)]) == as_lists(whole[size : size + 1])
    assert rows.length == config.length


def test_the_split_parts_documents_by_content(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [f"Text {number}." for number in range(300)] * 2
    path = write_texts(tmp_path / "a.jsonl", texts)

    def part(split: str) -> list[str]:
        config = DataConfig(path, length=1, split=split, held_out_share=0.2, shuffle=False)
        return [
            tiny_tokenizer.decode(ids[:-1]) for ids in documents_in(list(PackedRows(config, tiny_tokenizer, 1)))[:-1]
        ]

    train, held_out = part("train"), part("held_out")
    assert sorted(train + held_out) == sorted(part("all")) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / len(texts) < 0.3


def test_a_position_of_other_data_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", some_texts(9))
    state = PackedRows(DataConfig(path, length=8), tiny_tokenizer).state_dict()
    PackedRows(DataConfig(path, length=8), tiny_tokenizer).load_state_dict(state)
    others = [DataConfig(path, length=9), DataConfig(path, length=8, seed=1)]
    others.append(DataConfig(write_texts(tmp_path / "b.jsonl", some_texts(9)), length=8))
    for other in others:
        with pytest.raises(ValueError, match="position belongs to other data"):
            PackedRows(other, tiny_tokenizer).load_state_dict(state)
    write_texts(tmp_path / "a.jsonl", some_texts(10))
    with pytest.raises(ValueError, match="position belongs to other data"):
        PackedRows(DataConfig(path, length=8), tiny_tokenizer).load_state_dict(state)


def test_a_broken_line_in_the_middle_is_named_each_time(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": "Some words here."})] * 1030
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", *lines]))
    rows = PackedRows(DataConfig(str(tmp_path), length=8, shuffle=False, window=1), tiny_tokenizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl:1031 is no JSON"):
            list(rows)


def without(name: str) -> Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast]:
    def change(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        kept = {"eos_token": "<|im_end|>"} if name != "eos_token" else {}
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **kept)
        other.chat_template = "{{ raise_exception('roles must alternate') }}" if name == "roles" else None
        return other

    return change


@pytest.mark.parametrize(
    ("record", "changes", "tokenizer", "message"),
    [
        ({"text": " "}, {}, None, "holds no document that is not empty in split 'all'"),
        ({"text": "x"}, {"split": "held_out", "held_out_share": 1e-9}, None, "not empty in split 'held_out'"),
        (
            {"text": "The river"},
            {"length": 99},
            None,
            r"only \d tokens, too few for 1 x 99; give more text or a smaller data.length",
        ),
        ({"tokens": [5, 320]}, {}, None, "token ids run from 5 to 320, but the vocabulary has 320 entries"),
        ({"tokens": [5, -1]}, {}, None, "token ids run from -1 to 5"),
        ({"text": "x"}, {}, without("eos_token"), "no EOS token"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, without("chat_template"), "no chat template"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, without("roles"), r"refuses a chat \(roles must alter"),
    ],
)
def test_data_that_gives_no_row_is_one_sentence(
    record: dict[str, Any],
    changes: dict[str, Any],
    tokenizer: Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast] | None,
    message: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    config = DataConfig(str(tmp_path / "a.jsonl"), **{"length": 4, **changes})
    with pytest.raises(ValueError, match=message) as caught:
        list(PackedRows(config, tokenizer(tiny_tokenizer) if tokenizer else tiny_tokenizer, epochs=1))
    assert "\n" not in str(caught.value)


def test_token_ids_may_fill_a_larger_vocabulary(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.parquet", [torch.tensor([5, 400])], {})
    config = DataConfig(str(tmp_path / "a.parquet"), length=3)
    assert as_lists(list(PackedRows(config, tiny_tokenizer, 1, vocab_size=512))) == [([5, 400, EOS], [0, 0, 0])]


def test_written_documents_come_back_with_their_meta(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.parquet"
    write_documents(path, [torch.tensor([5, 6]), torch.tensor([7])], {"teacher": "x", "seed": 3})
    assert read_meta(path) == {"teacher": "x", "seed": 3}
    write_documents(path, [torch.tensor([8])], {"seed": 4})
    assert read_meta(path) == {"seed": 4}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.parquet"]
    with pytest.raises(ValueError, match=r"must end with \.parquet"):
        write_documents(tmp_path / "a.npz", [], {})


def test_a_full_disk_leaves_the_old_documents_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_documents(path, [torch.tensor([5, 6])], {"seed": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a file may not grow beyond 1000 bytes
    try:
        with pytest.raises(OSError, match="large"):
            write_documents(path, [torch.randint(320, (20_000,))], {"seed": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
