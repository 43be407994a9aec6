"""The engine in a torch model's place: logits, states, figures and answers are those of the model it came from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mar.adapter import EngineModel, load_engine
from mar.census import census
from mar.costs import cost
from mar.evaluate import held_out
from mar.folder import load_student, save_student
from mar.generate import Session, TokenStream, stop_ids, stream
from mar.model import MarForCausalLM
from mar.results import measure
from mar.spikes import SpikeMonitor
from mar.tasks import run_tasks
from mar.teachers import Teacher
from tiny_engine import spiking_model, tokens
from tiny_models import mar_model, packed_rows

VOCAB = 320
CARD: dict[str, Any] = {"step": "align", "teacher": {"kind": "folder", "name": "a teacher"}, "tokens": 7, "metrics": {}}


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("students")
    settings: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": 0}
    students = {
        "dense": mar_model(vocab_size=VOCAB, **settings),
        "spiking": spiking_model(vocab_size=VOCAB, **settings),
    }
    for name, student in students.items():
        save_student(student, tiny_tokenizer, base / name, CARD)
    return base


@pytest.fixture
def dense(folders: Path) -> MarForCausalLM:
    return load_student(folders / "dense")


@pytest.fixture
def native(folders: Path) -> EngineModel:
    """The dense student, whose logits cannot be moved by a code that flips."""
    return load_engine(folders / "dense", "fp32", threads=1)[0]


@pytest.fixture
def spiking(folders: Path) -> EngineModel:
    return load_engine(folders / "spiking", "fp32", threads=1)[0]


def ids_of(rows: int, length: int) -> torch.Tensor:
    return tokens(rows * length, vocabulary=VOCAB).view(rows, length)


@torch.no_grad()
def test_logits_are_the_models(dense: MarForCausalLM, native: EngineModel) -> None:
    ids = ids_of(3, 20)
    assert torch.allclose(native(ids).logits, dense(ids).logits, atol=1e-3)
    last = native(input_ids=ids, logits_to_keep=1).logits
    assert torch.allclose(last, dense(ids, logits_to_keep=1).logits, atol=1e-3)
    assert (native.device.type, native.dtype, native.precision) == ("cpu", torch.float32, "native fp32")


@torch.no_grad()
def test_padding_leaves_no_trace(dense: MarForCausalLM, native: EngineModel) -> None:
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 9:] = 0
    expected, found = dense(ids, attention_mask=mask).logits, native(ids, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-3)
    assert not found[~mask.bool()].any()


def test_a_cache_goes_on(native: EngineModel) -> None:
    ids = ids_of(2, 20)
    cache = native.new_cache(2)
    parts = [native(part, past_key_values=cache).logits for part in ids.split([7, 1, 12], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), native(ids).logits, atol=1e-4)


@torch.no_grad()
def test_packed_rows_come_in_blocks(
    dense: MarForCausalLM, native: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.adapter.BLOCK", 6)
    rows = packed_rows(((5, 11, 8), (14, 1, 9), (23, 1)), vocabulary=VOCAB)
    blocks = list(native.logit_blocks(**rows))
    assert max(map(len, blocks)) == 6
    expected = dense(**rows).logits[:, :-1].flatten(0, 1)
    assert torch.allclose(torch.cat(blocks), expected, atol=1e-3)


def test_streams_and_chats_say_what_torch_says(
    dense: MarForCausalLM, native: EngineModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert stop_ids(native) == stop_ids(dense) == {2}
    prompt = ids_of(1, 9)
    assert list(stream(native, prompt, 30, temperature=0)) == list(stream(dense, prompt, 30, temperature=0))
    states = [TokenStream(model) for model in (native, dense)]
    for length in (4, 1, 7):
        first, second = (list(stream(s.model, ids_of(1, length), 5, temperature=0, stop=(), state=s)) for s in states)
        assert first == second
    sessions = [Session(model, tiny_tokenizer, temperature=0) for model in (native, dense)]
    for text in ("hello", "and then?"):
        first, second = ("".join(session.reply(text, max_new_tokens=5)) for session in sessions)
        assert first == second


def test_held_out_figures_are_the_models(
    dense: MarForCausalLM, native: EngineModel, tiny_llama: LlamaForCausalLM
) -> None:
    rows = packed_rows(((5, 11, 8), (14, 1, 9)), vocabulary=VOCAB)
    students = {"native": native, "torch": dense}
    found = held_out(students, tiny_llama, rows["input_ids"], document_ids=rows["document_ids"], window=24)
    assert found["native"].precision == "native fp32"
    assert found["torch"].precision == "fp32"
    for figure in ("ppl", "teacher_ppl", "kl", "reverse_kl", "agreement"):
        first, second = (getattr(found[name], figure).value for name in students)
        assert first == pytest.approx(second, rel=1e-3)


def test_answers_to_tasks_are_the_models(
    dense: MarForCausalLM, native: EngineModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    items = [{"goal": "Open a jar.", "sol1": f"Twist it {n} times.", "sol2": "Sit.", "label": n % 2} for n in range(3)]
    items[2]["goal"] = "Open a jar, then the next. " * 400  # loses its beginning
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    models = {"native": (native, tiny_tokenizer), "torch": (dense, tiny_tokenizer)}
    answers = run_tasks(models, ["piqa"], tmp_path, batch_size=2).items["piqa"]
    for one, other in zip(answers["native"], answers["torch"], strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, rel=1e-3)


def test_a_choice_of_one_token(native: EngineModel) -> None:
    context = [3, 4, 5]
    (short, greedy), (long, _) = native.continuations(context, [[7], [7, 8, 9]])
    scores = native.engine.score([*context, 7, 8, 9])[-3:]
    assert (short, long) == (pytest.approx(scores[0], abs=1e-4), pytest.approx(scores.sum(), abs=1e-4))
    best = int(native.engine.prefill(native.engine.new_state(), context).argmax())
    assert greedy == (best == 7)
    assert native.continuations(context, [[best]])[0][1]


@torch.no_grad()
def test_rates_are_the_monitors(folders: Path, spiking: EngineModel) -> None:
    """Up to a code or two that fp32 rounding flips."""
    student, ids = load_student(folders / "spiking"), ids_of(1, 60)
    with SpikeMonitor(student) as monitor:
        student(ids)
    spiking(ids_of(1, 30))
    spiking.reset()
    assert spiking.rates() == {}
    spiking(ids)
    expected = monitor.summary()
    rates = spiking.rates()
    assert rates.keys() == expected.rates().keys()
    for key, rate in expected.rates().items():
        assert rates[key] == pytest.approx(rate, abs=0.01)
    usage = spiking.usage()
    assert usage["spikes_per_mac"] == pytest.approx(expected.totals.spikes_per_mac, abs=0.005)
    assert usage["nonzero_per_mac"] == pytest.approx(expected.totals.nonzero_per_mac, abs=0.005)
    assert usage["energy_uj"] == pytest.approx(cost(census(student.config, 512, expected)).with_head, rel=0.01)


def test_speed_is_counted_from_the_prompt_on(native: EngineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.0, 12.0])
    monkeypatch.setattr("mar.adapter.time.perf_counter", lambda: next(clock))
    assert len(list(stream(native, ids_of(1, 6), 4, stop=(), seed=0))) == 4
    usage = native.usage()
    assert usage["tokens_per_s"] == pytest.approx(3 / 2)
    assert usage.keys() == {"tokens_per_s", "energy_uj"}, "a dense model has no spikes"
    native.reset()
    assert "tokens_per_s" not in native.usage()


def test_torch_leaves_the_cores_to_the_engine(native: EngineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two reads, while it draws a token or judges choices; before and after it has the threads it had."""
    seen, before = [], torch.get_num_threads()

    def clock() -> float:
        seen.append(torch.get_num_threads())
        return float(len(seen))

    monkeypatch.setattr("mar.adapter.time.perf_counter", clock)
    torch.set_num_threads(2)
    try:
        for _ in stream(native, ids_of(1, 5), 3, stop=(), seed=0):
            assert torch.get_num_threads() == 2
        assert seen == [1, 1, 1]
        native.continuations([1, 2], [[3], [4, 5]])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        native.reset()


def test_results_take_rates_from_the_engine(
    spiking: EngineModel, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = packed_rows(((20, 12), (32,)), vocabulary=VOCAB)
    teacher = Teacher(tiny_llama, tiny_tokenizer, {"name": "teacher"})
    spiking(ids_of(1, 10))  # is not counted
    found = measure({"one": spiking}, teacher, rows, "a text", precision="fp32")
    assert json.loads(json.dumps(found)) == found
    assert found["spikes"]["one"]["tokens"] == 62
    assert len(found["spikes"]["one"]["sites"]) == 8
    assert found["spikes"]["one"]["totals"] == spiking.rates_per_mac()
    expected = cost(census(spiking.config, 512, spiking.rates()))
    assert found["energy"]["one"]["decoder_uj"] == expected.decoder
    assert found["rate_grids"] == {}


def test_the_folders_generation_config_counts(folders: Path, native: EngineModel) -> None:
    assert native.generation_config is not None
    native.generation_config.eos_token_id = None
    native.config.eos_token_id = None
    assert stop_ids(native) == set()


def test_a_wrong_config_is_one_sentence(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(folders / "spiking", tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "chunk_size": 0}))
    with pytest.raises(ValueError, match="chunk_size is 0; it must be"):
        load_engine(folder)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_generation_config_is_named(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "spiking", tmp_path / "copy"))
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        load_engine(folder)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("nowhere", r"nowhere holds no config\.json"), ("llama", "holds a 'llama' model, not a MAR one")],
)
def test_what_is_no_mar_folder(tiny_llama_folder: Path, name: str, problem: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        load_engine(tiny_llama_folder if name == "llama" else name)


def test_a_missing_core_is_one_sentence_on_the_command_line(folders: Path) -> None:
    code = "import sys; sys.modules['mar._native'] = None; from mar.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "generate", str(folders / "dense"), "Why?"]
    done = subprocess.run([*command, "--engine", "native"], capture_output=True, text=True)
    expected = "mar: mar was installed without its native core, which mar.engine needs; install g++ or clang and"
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(expected)
