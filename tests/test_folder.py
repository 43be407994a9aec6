import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from mar.checkpoint import DiskFull
from mar.config import NeuronConfig, site_neurons
from mar.folder import digest, load, load_student, load_tokenizer, model_type, read_provenance, save_student
from mar.model import MarForCausalLM
from tiny_models import mar_model
from tiny_recipes import files_of

PROVENANCE = {"step": "spike", "teacher": {"name": "tiny", "kind": "folder", "license": "MIT"}, "tokens": 1234}


def student() -> MarForCausalLM:
    return mar_model(vocab_size=320, neurons=site_neurons(NeuronConfig()))


@pytest.fixture(scope="module")
def saved(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "student"
    save_student(student(), tiny_tokenizer, folder, PROVENANCE)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_what_is_saved_is_loaded(saved: Path) -> None:
    expected = student().state_dict()
    for model in (
        load_student(saved),
        load_student(str(saved)),
        load(saved)[0],
        AutoModelForCausalLM.from_pretrained(saved),
    ):
        assert isinstance(model, MarForCausalLM)
        assert not model.training
        assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
    assert load(saved)[1]("They walked.").input_ids == load_tokenizer(saved)("They walked.").input_ids


def test_loading_says_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_student(saved)
    assert capfd.readouterr() == ("", "")


def test_a_failed_save_leaves_what_was_there(
    copied: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files_of(copied)
    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", full)
    for folder in (copied, tmp_path / "new"):
        with pytest.raises(DiskFull):
            save_student(mar_model(seed=1, vocab_size=320), tiny_tokenizer, folder, PROVENANCE)
    assert files_of(copied) == before
    assert not any((tmp_path / "new").iterdir())


def test_damaged_provenance_is_named(copied: Path) -> None:
    assert read_provenance(copied)["tokens"] == 1234
    for content in ("", "{", "[]", "{}", "null", '{"teacher": 3}', "[" * 100_000):
        (copied / "provenance.json").write_text(content)
        with pytest.raises(ValueError, match=r"provenance\.json is damaged \(.*\); restore it, or remove"):
            read_provenance(copied)


def test_a_tied_config_over_a_head_of_its_own(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"do not belong together \(see 'lm_head.weight'\)"):
        load_student(copied)


def test_a_tied_head_is_loaded(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_student(mar_model(vocab_size=320, tie_word_embeddings=True), tiny_tokenizer, tmp_path, PROVENANCE)
    model = load_student(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_provenance_and_card(saved: Path) -> None:
    found = json.loads((saved / "provenance.json").read_text())
    assert PROVENANCE.items() <= found.items()
    assert found["packages"]["torch"] == torch.__version__
    assert found["finished"].endswith("+00:00")
    card = (saved / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: tiny" in card
    assert "1,234 training tokens" in card
    assert "a spiking MAR model" in card


def test_no_pickle_is_written(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ".md", ".jinja"}


def test_the_digest_is_of_config_and_weights(saved: Path, copied: Path) -> None:
    assert digest(copied) == digest(saved)
    (copied / "README.md").write_text("other")
    assert digest(copied) == digest(saved)
    for name in ("config.json", "model.safetensors"):
        before = digest(copied)
        (copied / name).write_bytes((copied / name).read_bytes() + b" ")
        assert digest(copied) != before


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def cut_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:-20])


def set_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def set_weight(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        new = make(weights.pop(name))
        save_file(weights if new is None else {**weights, name: new}, file, {"format": "pt"})

    return apply


def poison(weight: torch.Tensor) -> torch.Tensor:
    weight[0, 1] = torch.nan
    return weight


def make_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(weights, file)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


NORM = "model.layers.1.mixer.out_proj.weight"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_weights, r"copy.model\.safetensors is truncated or damaged \(.*\); restore it or refine again"),
        (make_pickle, r"copy holds its weights as a pickle \(pytorch_model\.bin\), which can run code"),
        (remove("model.safetensors"), r"copy holds no model\.safetensors; give a folder that `mar refine`"),
        (remove("config.json"), r"copy holds no config\.json; give a folder that `mar refine`"),
        (cut_config, r"copy.config\.json is damaged \(.*\); restore it"),
        (set_config(model_type="llama"), r"copy holds a 'llama' model, not a MAR one; convert it first"),
        (set_config(hidden_size=64), r"config\.json and weights of .* do not belong together \(see 'lm_head"),
        (set_config(num_hidden_layers=3), r"do not belong together \(see 'model\.layers\.2\."),
        (set_config(num_hidden_layers=1), r"do not belong together \(see 'model\.layers\.1\."),
        (
            set_config(hidden_size="wide"),
            r"no MAR model \(hidden_size is 'wide'; .*\); restore it",
        ),
        (set_config(input_gain="some"), r"config\.json describes no MAR model \(.*input_gain is 'some'"),
        (set_config(neurons={"in_proj": {"T": 4}}), r"describes no MAR model \(.*neurons\.in_proj has unknown keys"),
        (set_weight(NORM, lambda _: None), rf"do not belong together \(see '{NORM}'\)"),
        (set_weight(NORM, lambda weight: weight[:, 1:].clone()), rf"do not belong together \(see '{NORM}'\)"),
        (set_weight(NORM, poison), rf"copy has NaN or infinite elements in '{NORM}'; restore it"),
    ],
)
def test_what_is_no_whole_folder_is_refused_in_one_sentence(
    copied: Path, damage: Callable[[Path], None], problem: str
) -> None:
    damage(copied)
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as caught:
        load_student(copied)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing holds no config\.json"):
        load_student(tmp_path / "missing")


def test_a_tokenizer_is_needed(copied: Path) -> None:
    tokenizer = copied / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:100])
    with pytest.raises(ValueError, match=r"The tokenizer in .*copy cannot be read \(.*\); copy the teacher's there"):
        load(copied)
    tokenizer.unlink()
    with pytest.raises(FileNotFoundError, match=r"copy has no tokenizer\.json; copy the teacher's tokenizer there"):
        load(copied)


def test_a_tokenizer_fits_its_model(copied: Path) -> None:
    set_config(vocab_size=300)(copied)
    with pytest.raises(ValueError, match=r"has ids up to 319, but the model's vocabulary has 300 entries; copy the"):
        load_tokenizer(copied)


def test_load_takes_teachers_too(tiny_llama_folder: Path) -> None:
    model, tokenizer = load(tiny_llama_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert model_type(tiny_llama_folder) == "llama"
    assert len(tokenizer) == model.config.vocab_size
