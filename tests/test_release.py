"""The released model: whole, within the sizes that Git hosts take, and speaking through the engine."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mar.engine import Engine
from mar.folder import load_tokenizer, read_provenance
from mar.weights import weight_files

ROOT = Path(__file__).parents[1]
(FOLDER,) = (ROOT / "models").iterdir()
FILES = sorted(file for file in FOLDER.iterdir() if file.name != "SHA256SUMS")


def test_every_file_has_its_checksum() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in FILES]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 98_000_000
    assert all(file.stat().st_size < 50_000_000 for file in FILES)


def test_card_licence_and_provenance() -> None:
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert "SmolLM2-135M-Instruct" in card
    provenance = read_provenance(FOLDER)
    steps = [step["step"] for step in provenance["history"]]
    spiking = ["insert_neurons", "spike", "spike", "retune_neurons", "spike", "spike"]
    assert [*steps, provenance["step"]] == ["convert", "align", "distill", *spiking, "pack"]
    assert provenance["history"][0]["parent"]["name"] == "smollm2-135m"
    assert not re.search(r'"/', json.dumps(provenance)), "A path of a machine."


def test_it_knows_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the engine as it is stored: words in order are far likelier than the same ones the wrong way round."""
    monkeypatch.setenv("MAR_CACHE", str(tmp_path))
    engine, tokenizer = Engine.from_pretrained(FOLDER, threads=1), load_tokenizer(FOLDER)
    assert (engine.settings["precision"], len(weight_files(FOLDER, "")) > 1) == ("int4", True)
    text = "The children went to the river in the morning, and they did not come back until it was dark."
    orders = (text, " ".join(reversed(text.split())))
    likely, unlikely = (float(np.mean(engine.score(tokenizer(order)["input_ids"]))) for order in orders)
    assert likely > unlikely + 1.5
    counted = engine.counters()
    assert len(counted["sites"]) == 120
    assert all(site["spikes"] >= site["nonzero"] > 0 for site in counted["sites"])


def test_make_chat_talks_with_it() -> None:
    assert f"RELEASED := models/{FOLDER.name}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
