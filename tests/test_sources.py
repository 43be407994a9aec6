import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mar.sources import HUB_PRESETS, DataConfig, Document, LocalFiles, check_text, open_source, read_document

RECORDS = [{"text": f"Document number {number}."} for number in range(23)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=5)
    elif path.suffix == ".txt":
        path.write_text(records[0]["text"], encoding="utf-8")
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def texts(config: DataConfig, epoch: int = 0) -> list[str]:
    return [document.content for window in open_source(config).windows(epoch, 0, 0) for document in window[2]]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_every_kind_of_file_gives_its_documents_in_order(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, RECORDS)
    for source in (str(path), str(tmp_path), f"{tmp_path}/*{path.suffix}"):
        assert texts(DataConfig(source, shuffle=False)) == [record["text"] for record in RECORDS]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First line.\n\nSecond paragraph.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Another.", encoding="utf-8")
    assert texts(DataConfig(str(tmp_path), shuffle=False)) == ["First line.\n\nSecond paragraph.\n", "Another."]


def test_a_list_of_sources_is_read_in_its_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b.jsonl", RECORDS[:2]), write(tmp_path / "a.parquet", RECORDS[2:4])
    read = texts(DataConfig([str(first), str(second)], shuffle=False))
    assert read == [record["text"] for record in RECORDS[:4]]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(("skip", "take"), [(0, 7), (4, 9), (5, 5), (22, None), (3, 100)])
def test_skip_and_take_count_documents_over_files(name: str, skip: int, take: int | None, tmp_path: Path) -> None:
    write(tmp_path / f"1{name}", RECORDS[:11])
    write(tmp_path / f"2{name}", RECORDS[11:])
    read = texts(DataConfig(str(tmp_path), shuffle=False, skip=skip, take=take))
    assert read == [record["text"] for record in RECORDS[skip:][:take]]


def test_a_long_jsonl_file_is_read_in_chunks_from_any_of_them(tmp_path: Path) -> None:
    # lines of uneven length, some of them blank, over more than two chunks
    lines = ["" if number % 97 == 5 else json.dumps({"text": "é" * (number % 7 + 1)}) for number in range(2500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = [json.loads(line)["text"] for line in lines if line]
    config = DataConfig(str(tmp_path / "a.jsonl"), shuffle=False, window=1)
    windows = list(open_source(config).windows(0, 0, 0))
    assert [document.content for window in windows for document in window[2]] == expected
    assert len(windows) == 3
    again = list(open_source(config).windows(0, 2, 0))
    assert again == windows[2:]


def test_shuffling_depends_on_seed_and_epoch_and_loses_nothing(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.parquet", RECORDS))
    config = DataConfig(path, window=1)
    plain = sorted(record["text"] for record in RECORDS)
    orders = [texts(config), texts(config, epoch=1), texts(DataConfig(path, window=1, seed=1))]
    assert all(sorted(order) == plain for order in orders)
    assert orders[0] == texts(config)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("window", [1, 6, 10, 1000])
def test_windows_are_filled_with_whole_blocks(window: int, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.parquet", RECORDS))
    sizes = [len(found) for _, _, found in open_source(DataConfig(path, shuffle=False, window=window)).windows(0, 0, 0)]
    assert sizes == {1: [5, 5, 5, 5, 3], 6: [10, 10, 3], 10: [10, 10, 3], 1000: [23]}[window]


def turns(first: str, second: str, *names: str) -> list[dict[str, str]]:
    return [{first: names[0], second: "Hello?"}, {first: names[1], second: "Yes."}]


CHAT = Document("chat", turns("role", "content", "user", "assistant"))


@pytest.mark.parametrize(
    ("record", "settings", "document"),
    [
        ({"text": "Hi.", "prompt": "Greet."}, {}, Document("text", "Greet.\n\nHi.")),
        ({"text": "Hi.", "prompt": None}, {}, Document("text", "Hi.")),
        ({"text": "Hi.", "prompt": "Greet."}, {"prompt_field": None}, Document("text", "Hi.")),
        ({"text": "Hi.", "question": "Greet."}, {"prompt_field": "question"}, Document("text", "Greet.\n\nHi.")),
        ({"text": "Hi.", "prompt": "Greet."}, {"field": "prompt"}, Document("text", "Greet.")),
        ({"text": " \n", "prompt": "Greet."}, {}, None),
        ({"text": None}, {}, None),
        ({"tokens": [5, 0, 7], "text": "Hi."}, {}, Document("tokens", [5, 0, 7])),
        ({"tokens": []}, {}, None),
        ({"messages": turns("role", "content", "user", "assistant"), "text": "Hi."}, {}, CHAT),
        # OpenHermes and Infinity-Instruct
        ({"conversations": turns("from", "value", "human", "gpt"), "source": "x"}, {}, CHAT),
        # GenQA: `prompt` is what its author asked the writing model, and no part of the document
        ({"text": turns("role", "content", "user", "assistant"), "prompt": "Write 40 questions."}, {}, CHAT),
    ],
)
def test_a_record_becomes_a_document(
    record: dict[str, Any], settings: dict[str, Any], document: Document | None
) -> None:
    assert read_document(record, DataConfig("x", **settings), "x:1") == document


def hub_copy(folder: Path, shards: dict[str, list[int]]) -> str:
    """A data set in the hub's own layout: per split a number of parquet shards with so many chats each."""
    for split, sizes in shards.items():
        for shard, size in enumerate(sizes):
            chats = [[{"role": "user", "content": f"{split} {shard} {number}"}] for number in range(size)]
            records = [{"text": chat, "prompt": "unused"} for chat in chats]
            write(folder / "data" / f"{split}-{shard:05}-of-{len(sizes):05}.parquet", records)
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in shards)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"hub:{folder}"


def test_a_hub_data_set_streams_every_split_once_and_from_any_position(tmp_path: Path) -> None:
    sizes = {"code": [7, 4], "dialog": [9, 1, 3, 6, 2, 2, 5, 8, 6, 4]}
    source = hub_copy(tmp_path, sizes)
    config = DataConfig(source, field="text", hub_split="*", window=16)
    windows = list(open_source(config).windows(0, 0, 0))
    found = [document.content[0]["content"] for window in windows for document in window[2]]
    expected = [f"{s} {shard} {n}" for s in sizes for shard, size in enumerate(sizes[s]) for n in range(size)]
    assert sorted(found) == sorted(expected)
    assert len({text.rsplit(" ", 1)[0] for text in found[:16]}) == 8  # shards are read side by side
    assert len(windows) > 4
    for number, (group, taken, _) in enumerate(windows):
        assert list(open_source(config).windows(0, group, taken)) == windows[number:]
    other = [
        document.content[0]["content"] for window in open_source(config).windows(1, 0, 0) for document in window[2]
    ]
    assert sorted(other) == sorted(expected)
    assert other != found


def test_one_split_of_a_hub_data_set(tmp_path: Path) -> None:
    source = hub_copy(tmp_path, {"train": [2], "test": [3]})
    for split, size in ((None, 2), ("train", 2), ("test", 3), ("*", 5)):
        config = DataConfig(source, hub_split=split, shuffle=False)
        assert sum(len(window[2]) for window in open_source(config).windows(0, 0, 0)) == size
    with pytest.raises(ValueError, match="hub_split 'valid'"):
        open_source(DataConfig(source, hub_split="valid"))


@pytest.mark.parametrize("source", [*HUB_PRESETS, "hub:nobody/nothing"])
def test_an_unreachable_hub_is_one_sentence(source: str) -> None:
    with pytest.raises(OSError, match=r"cannot be read from the Hugging Face hub .* or give local files\.$"):
        open_source(DataConfig(source))


LINES = '{"text": "one"}\n\n{"text": "two"\n'
BAD: dict[str, tuple[bytes | None, dict[str, Any], str]] = {
    # file: its content (None: there is none), settings, what the message says
    "none.txt": (None, {}, "there is no .*none.txt"),
    "a.csv": (b"x", {}, "a.csv is of an unknown kind"),
    "line.jsonl": (LINES.encode(), {}, "line.jsonl:3 is no JSON"),
    "list.jsonl": (b"[1]", {}, "list.jsonl:1 holds no JSON object"),
    "latin.txt": (b"caf\xe9", {}, r"no UTF-8 text \(byte 3\)"),
    "body.jsonl": (b'{"body": "x"}', {}, r"body.jsonl:1 has no column tokens or .* or text, only \['body'\]"),
    "number.jsonl": (b'{"text": 3}', {}, "number.jsonl:1: a document must be text"),
    "turn.jsonl": (b'{"messages": [{"role": "user"}]}', {}, r"turn.jsonl:1: a turn needs .* not \['role'\]; mend"),
    "no.parquet": (b"PAR1", {}, "no.parquet is truncated or damaged"),
    "no.jsonl.gz": (gzip.compress(bytes(range(256)) * 9)[:-40], {}, "no.jsonl.gz is truncated or damaged"),
    "plain.jsonl.gz": (b'{"text": "x"}', {}, "plain.jsonl.gz is truncated or damaged"),
    "deep.jsonl": (b"[" * 200_000, {}, "deep.jsonl:1 is no JSON"),
    "empty.jsonl": (b"", {}, "holds no documents; "),
    "short.jsonl": (b'{"text": "x"}\n', {"skip": 1}, "holds no documents after the 1 skipped"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, settings, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        list(open_source(DataConfig(str(tmp_path / name), **settings)).windows(0, 0, 0))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_missing_parquet_column_is_found_before_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", RECORDS)
    with pytest.raises(ValueError, match=r"a.parquet has no column body, only \['text'\]; set data.field"):
        open_source(DataConfig(str(path), field="body"))


def test_a_damaged_page_of_a_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", RECORDS)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the footer stays whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is truncated or damaged"):
        list(open_source(DataConfig(str(path))).windows(0, 0, 0))


def test_a_home_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="names no home folder"):
        open_source(DataConfig("~nobody-of-this-name/text.txt"))


def test_half_a_surrogate_pair_is_no_text() -> None:
    check_text("naïve 🙂 \0")
    with pytest.raises(ValueError, match=r"the text holds '\\ud800' near 'a\\ud800b', no Unicode"):
        check_text("a\ud800b")


def test_a_folder_must_hold_one_kind_of_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.parquet"):
        open_source(DataConfig(str(tmp_path)))
    write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "README.md").write_text("not data")
    assert len(texts(DataConfig(str(tmp_path)))) == len(RECORDS)
    write(tmp_path / "a.txt", RECORDS)
    with pytest.raises(ValueError, match=r"mixes .jsonl and .txt files; give a pattern, e.g. .*/\*.jsonl"):
        open_source(DataConfig(str(tmp_path)))


def test_what_a_hub_data_set_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"'genqa' among others; a hub data set must stand alone"):
        open_source(DataConfig(["a.txt", "genqa"]))
    with pytest.raises(ValueError, match=r"skip and data\.take need local files"):
        open_source(DataConfig("genqa", skip=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "x", "lenght": 5}, r"unknown keys \['lenght'\]"),
        ({"source": "x", "length": 0}, "data.length is 0"),
        ({"source": "x", "window": 0}, "data.window is 0"),
        ({"source": "x", "take": 0}, "data.take is 0"),
        ({"source": "x", "skip": -1}, "data.skip is -1"),
        ({"source": "x", "split": "test"}, "data.split is 'test'"),
        ({"source": "x", "split": "train", "held_out_share": 1.0}, "held_out_share is 1.0"),
        ({"source": []}, "data.source is empty"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.from_dict(settings)


def test_settings_come_out_of_a_mapping() -> None:
    assert DataConfig.from_dict({"source": ["a", "b"], "length": 8}) == DataConfig(["a", "b"], length=8)


def test_local_files_are_told_apart_by_name_and_size(tmp_path: Path) -> None:
    config = DataConfig(str(write(tmp_path / "a.jsonl", RECORDS)))
    assert LocalFiles([str(config.source)], config).identity == [["a.jsonl", (tmp_path / "a.jsonl").stat().st_size]]
