"""The benchmarks measure what they say: ours and its peers compute the same, and each script prints its one object."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mar import kernels
from mar.config import NeuronConfig
from mar.losses import chunked_bidirectional_kl
from mar.model import MarForCausalLM
from mar.neurons import build_neuron
from mar.optimizer import TrainConfig
from mar.spikes import SpikeMonitor
from mar.teachers import Teacher, load_teacher
from tiny_engine import saved, spiking_model
from tiny_models import llama_model, mar_config, mar_model, packed_rows, rms_ratio

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import align_quality  # noqa: E402
import decode  # noqa: E402
import engine_memory  # noqa: E402
import llama_peer  # noqa: E402
import plain  # noqa: E402
import prefill  # noqa: E402
import results_figures  # noqa: E402
import runners  # noqa: E402
import scan  # noqa: E402
import throughput  # noqa: E402
import timing  # noqa: E402

SENTENCE = "The river rose during the night and the children watched it from the bridge. "


@pytest.fixture(scope="module")
def teacher(tiny_llama_folder: Path) -> Teacher:
    found = load_teacher(tiny_llama_folder)
    # A fresh LLaMA's padding row, here its EOS too, is zero: then rounding errors decide B and C of unit length.
    seeded = torch.Generator().manual_seed(0)  # this runs before each test's own seeds are set
    torch.nn.init.normal_(found.model.get_input_embeddings().weight, std=0.15, generator=seeded)  # type: ignore[arg-type]
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCE[: 15 + 9 * (i % 6)]}) + "\n" for i in range(40)))
    return path


@pytest.mark.parametrize("stage", throughput.STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_and_ours_train_alike(teacher: Teacher, text: Path, tmp_path: Path, stage: str, precision: str) -> None:
    rows = throughput.text_rows(str(text), teacher, 96, tmp_path)
    assert next(rows)["document_ids"].max() > 0, "packed documents are part of the comparison"
    rows.rewind()
    dense, spiking = throughput.students(teacher, rows, spiking=True)
    config = TrainConfig(tokens=384, batch_size=2, lr=1e-3, warmup_steps=0, precision=precision)  # type: ignore[arg-type]
    found = throughput.measure_stage(stage, teacher, dense, spiking, rows, config, 1, ["ours", "plain"])
    tolerance = {"fp32": 1e-4, "bf16": 0.1}[precision]  # bf16 flips codes, and a tiny model has few
    for figure in ("loss", "gradient_norm"):
        ours, theirs = found[figure]["ours"], found[figure]["plain"]
        assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
        # One step of AdamW later; it turns tiny differences of tiny gradients into whole steps.
        assert ours[1] == pytest.approx(theirs[1], rel=20 * tolerance)
    assert found["loss"]["ours"][0] != found["loss"]["ours"][1]
    assert found["speedup"] == pytest.approx(found["seconds"]["plain"][0] / found["seconds"]["ours"][0])
    assert found["tokens_per_second"]["ours"] == pytest.approx(192 / found["seconds"]["ours"][0])


def test_plain_takes_the_place_of_every_op_and_gives_it_back() -> None:
    before = kernels.scan, kernels.causal_conv
    model = mar_model(neurons={"out_proj": {"time_steps": 3}})
    batch = packed_rows()
    ours = _autograd_names(model.model(**batch, use_cache=False).last_hidden_state)
    with plain.plain():
        assert kernels.scan is plain.scan
        assert kernels.causal_conv is plain.causal_conv
        names = _autograd_names(model.model(**batch, use_cache=False).last_hidden_state)
    assert not any(name.startswith("_") for name in names)  # mar's own functions, native or not
    assert "ConvolutionBackward0" in names
    assert (kernels.scan, kernels.causal_conv) == before
    assert any(name.startswith("_") for name in ours)
    assert _autograd_names(model.model(**batch, use_cache=False).last_hidden_state) == ours


def _autograd_names(output: torch.Tensor) -> set[str]:
    names, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [before for before, _ in node.next_functions]
    return names


@pytest.mark.parametrize("chunk", [4, 64])
def test_plain_scan_and_convolution(chunk: int) -> None:
    ids = packed_rows()["document_ids"]
    inputs, dy = scan.make_inputs(2, ids.shape[1], 3, torch.float64, size=5)
    state = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    ours = scan.gradients(lambda *tensors: kernels.scan(*tensors, state, ids, chunk)[0], inputs, dy)
    theirs = scan.gradients(lambda *tensors: plain.scan(*tensors, state, ids, chunk)[0], inputs, dy)
    for actual, expected in zip(theirs, ours, strict=True):
        assert rms_ratio(actual, expected) < 1e-6  # log decay is fp32
    last = [module.scan(*inputs, state, ids, chunk)[1] for module in (plain, kernels)]
    assert rms_ratio(*last) < 1e-6

    x, past = torch.randn(2, ids.shape[1], 6), torch.randn(2, 3, 6)
    tensors = tuple(tensor.requires_grad_() for tensor in (x, torch.randn(6, 4), torch.randn(6), past))
    both = [
        scan.gradients(lambda *given, conv=module.causal_conv: conv(*given, ids), tensors, torch.ones_like(x).cumsum(1))  # type: ignore[arg-type]
        for module in (plain, kernels)
    ]
    for actual, expected in zip(*both, strict=True):
        assert rms_ratio(actual, expected) < 1e-5


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.2, 0.7)])
def test_plain_loss(alpha: float, beta: float) -> None:
    hidden, head, their_hidden, their_head = (torch.randn(n, 8) for n in (10, 30, 10, 30))
    hidden.requires_grad_()
    losses = [
        loss(hidden, head, their_hidden, their_head, alpha, beta)
        for loss in (plain.bidirectional_kl, chunked_bidirectional_kl)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    assert rms_ratio(*gradients) < 1e-5


@pytest.mark.parametrize("kind", ["atmn", "binary"])
@pytest.mark.parametrize("precharge", [0.0, 0.25, 0.5])
def test_plain_neuron(kind: str, precharge: float) -> None:
    config = NeuronConfig(kind=kind, time_steps=3, precharge=precharge)
    neuron = build_neuron(config, 6)
    current = (3 * torch.randn(50, 6)).requires_grad_()
    gradient = torch.randn(50, 6)
    results = []
    for apply in (plain.ClosedForm.apply, lambda i, v, _: neuron(i)):
        output = apply(current, neuron.threshold, config)
        results.append((output.detach(), *torch.autograd.grad(output, (current, neuron.a), gradient)))
    for actual, expected in zip(*results, strict=True):
        assert rms_ratio(actual, expected) < 1e-5


def test_flops_by_hand() -> None:
    # One layer, hidden 4, FFN 6, 2 heads of 2 with a state of 3, 5 words, rows of 9 tokens; taps of the convolution: 4.
    llama = llama_model(
        num_hidden_layers=1,
        hidden_size=4,
        intermediate_size=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=5,
    ).config
    mar = mar_config(
        num_hidden_layers=1,
        hidden_size=4,
        intermediate_size=6,
        num_heads=2,
        head_dim=2,
        state_size=3,
        vocab_size=5,
    )
    attention = 4 * (4 + 2 + 2 + 4) + 2 * 5 * 4  # q, k, v, o; 5 keys on average, scores and their use
    ffn, head = 3 * 4 * 6, 4 * 5
    in_proj = 4 * (4 + 12 + 4 + 2)
    mixing = 4 * 4 + 4 * 16 + 2 * 12 + 4  # out_proj, convolution, state update and read-out, skip
    layer = in_proj + mixing + ffn
    expected = {
        "align": attention + 2 * in_proj + 3 * mixing,
        "distill": attention + ffn + head + 3 * layer + 2 * head,
        "spike_align": 4 * layer,
        "spike": 4 * layer + 3 * head,
    }
    assert {stage: throughput.flops_per_token(stage, llama, mar, 9) for stage in throughput.STAGES} == {
        stage: 2 * macs for stage, macs in expected.items()
    }


def test_throughput_prints_one_object_and_measures_memory(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--length", "16", "--batch", "1", "--rounds", "1", "--threads", "1", "--peers", "ours"]
    throughput.main(["--json", "--teacher", str(tiny_llama_folder), "--stages", "distill", *settings])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"benchmark", "environment", "settings", "stages", "distill_peak_memory_gb"}
    # A process that has loaded torch, but no large model.
    assert 0.1 < found["distill_peak_memory_gb"]["ours"] < 4
    figures = found["stages"]["distill"]
    limit = figures["arithmetic_limit_tokens_per_second"]
    assert limit == pytest.approx(figures["matmul_gflops"] / figures["gflop_per_token"])
    assert figures["share_of_matmul_peak"]["ours"] == pytest.approx(figures["tokens_per_second"]["ours"] / limit)


def test_scan_compares_the_same_map(capsys: pytest.CaptureFixture[str]) -> None:
    scan.main(["--json", "--length", "80", "--heads", "2", "--rounds", "1", "--threads", "1", "--chunk", "32"])
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert set(cases) == {"fp32, 2 heads", "bf16, 2 heads"}
    for name, figures in cases.items():
        peers = {"ours", "reference", "plain", "transformers"}
        assert set(figures["milliseconds"]) == set(figures["share_of_matmul_peak"]) == peers
        assert set(figures["speedup"]) == peers - {"ours"}
        assert max(figures["difference_from_reference"].values()) < (1e-4 if name.startswith("fp32") else 0.05)


def test_align_quality_compares_and_goes_on(
    tiny_llama_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(SENTENCE * 10)
    arguments = ["--json", "--teacher", str(tiny_llama_folder), "--text", str(text), "--held-out", str(held_out)]
    arguments += ["--output", str(tmp_path / "run"), "--tokens", "256", "--length", "32", "--held-out-tokens", "96"]
    arguments += ["--threads", "1", "--set", "stages.align.train.batch_size=1"]
    align_quality.main(arguments)
    found = json.loads(capsys.readouterr().out)
    runs = found["runs"]
    assert [runs[name]["training"]["steps"] for name in ("plain", "shipped")] == [2, 8]
    assert runs["plain"]["held_out"]["windows"] == 3
    kls = [runs[name]["held_out"]["kl"]["value"] for name in ("shipped", "plain")]
    assert found["kl_of_shipped_over_plain"] == pytest.approx(kls[0] / kls[1])
    log = tmp_path / "run" / "shipped" / "1-align" / "training" / "log.jsonl"
    written = log.stat().st_mtime_ns
    align_quality.main(arguments)
    assert json.loads(capsys.readouterr().out)["runs"] == runs
    assert log.stat().st_mtime_ns == written


@pytest.fixture
def student(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spiking student's folder; what the engine packs is kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps = {"in_proj": 2, "gate_up": 3, "down_proj": 4}
    neurons = {site: asdict(NeuronConfig(time_steps=count)) for site, count in steps.items()}
    model = mar_model(vocab_size=320, neurons=neurons)
    model.save_pretrained(tmp_path / "student")
    PreTrainedTokenizerFast.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_decode_counts_the_spikes_of_the_tokens_it_times(student: Path) -> None:
    tokens = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    ours = runners.EngineRunner(student, "fp32", "fp32", True, [1])
    ours.prefill(tokens[0, :5].tolist(), 1)
    for _ in range(2):  # the state that was read is still there the second time
        found = ours.count(5, tokens[0, 5:].tolist(), 1)
    model = MarForCausalLM.from_pretrained(student)
    seen = []
    for length in (5, 12):
        with SpikeMonitor(model) as monitor, torch.no_grad():
            model(tokens[:, :length])
        seen.append({name: sums.nonzero for name, sums in monitor.summary().by_site().items()})
    elements = {"in_proj": 2 * 7 * 32, "gate_up": 2 * 7 * 32, "down_proj": 2 * 7 * 48}
    counts = {name: seen[1][name] - seen[0][name] for name in elements}
    assert found["nonzero_share_by_site"] == {name: counts[name] / elements[name] for name in elements}
    assert found["nonzero_share"] == pytest.approx(sum(counts.values()) / sum(elements.values()))
    assert 0 < found["linear_bytes_per_token"] < found["linear_bytes"]
    assert found["other_bytes_per_token"] > 320 * 32 * 4, "the head is read whole"


def test_what_int4_reads_is_counted_once(student: Path) -> None:
    """The packed file has int4 weights in two orders, and a head in two steps in three forms."""
    config = MarForCausalLM.from_pretrained(student).config
    found = {}
    for head in ("int4", "int4+int8"):
        ours = runners.EngineRunner(student, "int4", head, True, [1])
        ours.prefill([1, 2], 1)
        found[head] = ours.count(2, [3, 4], 1)
        wide = -(-(config.conv_size + config.inner_size) // 128) * 128  # outputs are stored in twos of 64
        layer = 32 * wide + config.inner_size * 128 + 32 * 128 + 48 * 128
        assert found[head]["linear_bytes"] == config.num_hidden_layers * layer / 2
    # beside the same int4 weights and scales: 320 scales in fp32, 16 rows of 320 words
    more = found["int4+int8"]["other_bytes_per_token"] - found["int4"]["other_bytes_per_token"]
    assert more == 320 * 4 + 16 * 320


@pytest.mark.parametrize(
    ("benchmark", "places"), [(decode, ["--tokens", "4", "--contexts", "9", "3"]), (prefill, ["--lengths", "9", "3"])]
)
def test_decode_and_prefill_print_one_object(
    benchmark: ModuleType,
    places: list[str],
    student: Path,
    tiny_llama_folder: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--json", str(student), "--teacher", str(tiny_llama_folder), "--text", str(text), "--rounds", "1"]
    benchmark.main([*arguments, "--threads", "2", "1", *places])
    found = json.loads(capsys.readouterr().out)
    assert len(found["cases"]) == 4
    assert found["threads"] == 2
    assert found.get("context") == 3 or found["tokens"] == 9
    for case in [found, *found["cases"]]:
        speeds = case["tokens_per_s"]
        assert set(speeds) == {"ours", "neurons_off", "transformers_bf16"}
        # with one round the ratio of medians is the median of ratios
        assert case["ratio"] == {name: pytest.approx(speeds["ours"] / speeds[name]) for name in set(speeds) - {"ours"}}


def test_llama_cpp_that_ends_is_named(tmp_path: Path) -> None:
    # the tests' own environment has no llama-cpp-python, so the server cannot start there
    with pytest.raises(OSError, match=r"llama.cpp ended with code 1 on model.gguf"):
        llama_peer.LlamaPeer(sys.executable, tmp_path / "model.gguf")


def test_fastest_file_of_llama_cpp() -> None:
    ratio = {"neurons_off": 1.5, "q8_0": 3.0, "q4_0": 2.0, "transformers_bf16": 1.1}
    assert runners.with_best(ratio) == ratio | {"best_llama_cpp": 2.0}
    assert runners.with_best({"neurons_off": 1.5}) == {"neurons_off": 1.5}


def test_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def peer(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    seconds = timing.alternate({"a": lambda: peer("a", 1.0), "b": lambda: peer("b", 3.0)}, rounds=2)
    assert "".join(calls) == "ababba"
    assert seconds == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert timing.speedup(seconds, "a", "b") == 3.0


def test_memory_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAR_CACHE", str(tmp_path))
    saved(spiking_model(), tmp_path / "student")
    engine_memory.main(["--json", str(tmp_path / "student"), "--threads", "1", "--prompt", "7", "--tokens", "2"])
    found = json.loads(capsys.readouterr().out)["bytes"]
    assert set(found) == {"int8", "int4"}
    for one in found.values():
        assert not one["imported_torch"]
        assert one["peak"] >= one["resident"] >= one["mapped"] > one["packed"] > 0
        assert one["allowed"] == pytest.approx(1.3 * one["packed"] + 60e6)


def test_figures_of_the_results_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    records = [{"step": i, "tokens": 8 * i, "kl_to_llama": 1 / i, "loss": 9.0} for i in range(1, 151)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = results_figures.curve(log)
    assert len(drawn) == 75
    assert drawn[1] == {"tokens": 32, "loss": round((1 / 3 + 1 / 4) / 2, 5)}
    monkeypatch.setattr(results_figures, "ASSETS", tmp_path)
    energy = {"dense": {"contexts": [64, 128], "decoder_uj": [1.0, 2.0]}}
    kept = {
        "logs": {"align": drawn},
        "energy_curves": energy,
        "rate_grids": {"0.75": {"spikes": [[0.5, 0.4, 0.3, 0.2]]}},
    }
    files = results_figures.draw(kept)
    assert [file.name for file in files] == ["results-loss.svg", "results-energy.svg", "results-rates-0.75.svg"]
    assert all(file.read_text().startswith("<svg ") for file in files)
