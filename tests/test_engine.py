"""The engine beside torch: logits, codes, counters, states, sampling, and what it says to wrong input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mar.compact import quantise
from mar.config import MIXER_PRESETS, NeuronConfig, site_neurons
from mar.engine import Engine, pack
from mar.engine.engine import _likeliest, sample
from mar.model import MarForCausalLM
from mar.spikes import SpikeMonitor
from tiny_engine import RAGGED, SPIKING, engine, engine_fidelity, run_torch, saved, spiking_model, tokens
from tiny_models import mar_model

WIDER = {"hidden_size": 72, "num_heads": 5, "head_dim": 16, "state_size": 16, "vocab_size": 130, "mlp_bias": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "ragged": {},
    "wide heads": WIDER,
    "tied": {"tie_word_embeddings": True},
    "llamba": MIXER_PRESETS["llamba"],
    "no gain": {"input_gain": "none"},
    "one tap": {"conv_kernel": 1, "num_hidden_layers": 1},
    "many taps": {"conv_kernel": 9},
    "tiny": {"hidden_size": 3, "num_heads": 1, "head_dim": 2, "state_size": 1, "intermediate_size": 5, "vocab_size": 7},
    "one layer over 64 wide": {"head_dim": 80, "num_heads": 1, "state_size": 70, "num_hidden_layers": 1},
    "window": {"window": 7, "rotary_base": 50.0},
    "window over 64 wide": {"head_dim": 80, "num_heads": 1, "state_size": 70, "num_hidden_layers": 1, "window": 64},
    "window of a few": {**WIDER, **MIXER_PRESETS["llamba"], "window": 4},
}
SITES_LEFT_OUT: dict[str, dict[str, Any]] = {
    "all": SPIKING,
    "in_proj": {"in_proj": {"time_steps": 16, "precharge": 0.5}},
    "out_proj and down_proj": {"out_proj": {}, "down_proj": {"kind": "binary", "precharge": 0.5}},
    "gate_up": {"gate_up": {"time_steps": 1, "threshold": "scalar"}},
    "127 steps": site_neurons(NeuronConfig(time_steps=127)),
}


def greedy(model: MarForCausalLM, ids: Tensor, count: int) -> list[int]:
    with torch.no_grad():
        found = model.generate(ids[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return found[0, len(ids) :].tolist()


def steps(native: Engine, ids: list[int]) -> np.ndarray:
    state = native.new_state()
    return np.stack([native.step(state, token) for token in ids])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_dense_logits_are_torchs(changes: dict[str, Any], tmp_path: Path):
    model = mar_model(**{**RAGGED, **changes})
    ids = tokens(200, vocabulary=model.config.vocab_size)
    native = engine(model, tmp_path, threads=2)
    expected = run_torch(model, ids)[0]
    state = native.new_state()
    # one token, a few, more than a chunk of the scan, the rest
    parts = [native.logits(state, part.numpy()) for part in ids.split([1, 7, 70, 122])]
    assert np.abs(np.concatenate(parts) - expected).max() < 1e-3
    assert np.abs(steps(native, ids.tolist()) - expected).max() < 1e-3
    assert state.tokens == 200


def test_greedy_continuation_is_torchs(tmp_path: Path):
    model = mar_model(**RAGGED)
    ids = tokens(20)
    expected = greedy(model, ids, 256)
    assert len(set(expected)) > 10, "the continuation must not be a constant"
    assert engine(model, tmp_path).generate(ids.tolist(), 256, temperature=0) == expected


@pytest.mark.parametrize(
    "changes", [{}, WIDER, {"conv_kernel": 1}, {"window": 9}], ids=["ragged", "wide heads", "one tap", "window"]
)
@pytest.mark.parametrize("neurons", SITES_LEFT_OUT.values(), ids=SITES_LEFT_OUT)
def test_codes_and_logits_are_torchs(neurons: dict[str, Any], changes: dict[str, Any], tmp_path: Path):
    """Each site's codes given the same site input: those of the sites before it are replayed."""
    model = spiking_model(**{"neurons": neurons, **changes})
    ids = tokens(60, vocabulary=model.config.vocab_size)
    expected, codes, near = run_torch(model, ids)
    assert 0.02 < (codes != 0).mean() < 0.98
    native = engine(model, tmp_path)
    state = native.new_state()
    found = [native.step_codes(state, token, row) for token, row in zip(ids.tolist(), codes, strict=True)]
    differ = np.stack([taken for _, taken in found]) != codes
    assert not (differ & ~near).any()
    assert differ.sum() <= near.sum() <= 1e-3 * codes.size
    assert np.abs(np.stack([logits for logits, _ in found]) - expected).max() < 1e-3


def test_codes_without_a_replay_are_those_of_a_step(tmp_path: Path):
    native = engine(spiking_model(), tmp_path, "int8")
    states = [native.new_state() for _ in range(3)]
    for token in tokens(20).tolist():
        logits, codes = native.step_codes(states[0], token)
        again, same = native.step_codes(states[1], token, codes)
        assert np.array_equal(logits, native.step(states[2], token))
        assert np.array_equal(logits, again)
        assert np.array_equal(codes, same)


def test_neurons_can_be_left_out(tmp_path: Path):
    model = spiking_model()
    native = engine(model, tmp_path, neurons=False)
    for _, site, _ in model.neuron_sites():
        model.config.neurons.pop(site, None)
    dense = MarForCausalLM(model.config).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    ids = tokens(30)
    expected = run_torch(dense, ids)[0]
    assert np.abs(native.logits(native.new_state(), ids.numpy()) - expected).max() < 1e-3


# Counters


def quiet_tokens(model: MarForCausalLM, count: int) -> Tensor:
    """Tokens on which no current comes so near a threshold that rounding could decide."""
    return next(ids for seed in range(20) if not run_torch(model, ids := tokens(count, seed))[2].any())


def counted(model: MarForCausalLM, ids: Tensor) -> dict[tuple[int, str], tuple[int, int]]:
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(ids[None])
    return {(site.layer, site.site): (site.spikes, site.nonzero) for site in monitor.summary().sites}


def sites(native: Engine) -> dict[tuple[int, str], dict[str, Any]]:
    return {(one["layer"], one["site"]): one for one in native.counters()["sites"]}


@pytest.mark.parametrize("neurons", [SPIKING, {"gate_up": {}, "out_proj": {"time_steps": 2}}], ids=["all", "two"])
def test_spikes_are_those_of_the_monitor(neurons: dict[str, Any], tmp_path: Path):
    model = spiking_model(neurons=neurons)
    ids = quiet_tokens(model, 40)
    expected = counted(model, ids)
    native = engine(model, tmp_path, threads=2)
    ways: list[Callable[[], Any]] = [
        lambda: steps(native, ids.tolist()),
        lambda: native.prefill(native.new_state(), ids.numpy()),
        lambda: native.logits(native.new_state(), ids.numpy()),
    ]
    for way in ways:
        native.reset_counters()
        way()
        assert native.counters()["tokens"] == 40
        found = {key: (one["spikes"], one["nonzero"]) for key, one in sites(native).items() if key in expected}
        assert found == expected
        assert not any(one["spikes"] for key, one in sites(native).items() if key not in expected)


def test_spikes_of_replayed_codes_are_those_of_the_monitor(tmp_path: Path):
    model, ids = spiking_model(), tokens(100)
    native = engine(model, tmp_path, "int4")
    state = native.new_state()
    for token, row in zip(ids.tolist(), run_torch(model, ids)[1], strict=True):
        native.step_codes(state, token, row)
    assert {key: (one["spikes"], one["nonzero"]) for key, one in sites(native).items()} == counted(model, ids)


@pytest.mark.parametrize("precision", pack.PRECISIONS)
def test_rows_and_bytes_by_hand(precision: str, tmp_path: Path):
    """One thread. Single tokens: a row for each code that is not zero, filled up to fours, and in int4 all rows where
    more than the crossover are not zero. Many: each once a block.
    """
    model = spiking_model(intermediate_size=60)
    native = engine(model, tmp_path, precision)
    config, crossover = model.config, native.crossover
    assert all(0 <= share <= 1 if precision == "int4" else share == 1 for share in crossover.values())
    inner, in_proj = config.inner_size, config.conv_size + config.inner_size
    shapes = {"in_proj": (40, in_proj), "out_proj": (inner, 40), "gate_up": (40, 128), "down_proj": (60, 40)}
    bytes_of = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}[precision]
    slices = {site: -(-outputs // 64) for site, (_, outputs) in shapes.items()}
    if precision == "int4":
        slices = {site: -(-count // 2) * 2 for site, count in slices.items()}
    in_fours = 4 if precision.startswith("int") else 1
    expected = dict.fromkeys(sites(native), 0)
    state = native.new_state()
    for token in tokens(25).tolist():
        _, codes = native.step_codes(state, token)
        for layer, part in enumerate(np.split(codes, config.num_hidden_layers)):
            for site, row in zip(shapes, np.split(part, np.cumsum([n for n, _ in shapes.values()])[:-1]), strict=True):
                count = int((row != 0).sum())
                whole = precision == "int4" and count > crossover[site] * len(row)
                expected[layer, site] += len(row) if whole else -(-count // in_fours) * in_fours
    for key, one in sites(native).items():
        assert one["rows"] == expected[key]
        assert one["bytes"] == one["rows"] * slices[key[1]] * 64 * bytes_of
    native.reset_counters()
    assert {(one["rows"], one["bytes"], one["nonzero"]) for one in sites(native).values()} == {(0, 0, 0)}
    native.prefill(state, tokens(2 * 256).numpy())
    stored = {site: -(-inputs // in_fours) * in_fours for site, (inputs, _) in shapes.items()}
    for (_, site), one in sites(native).items():
        assert one["rows"] == 2 * shapes[site][0], "blocks have 256 tokens"
        assert one["bytes"] == 2 * stored[site] * slices[site] * 64 * bytes_of
    assert native.counters()["tokens"] == 512


@pytest.mark.parametrize("precision", pack.PRECISIONS)
def test_sites_without_neurons_count_the_same_either_way(precision: str, tmp_path: Path):
    native = engine(mar_model(**RAGGED), tmp_path, precision)
    ids, found = tokens(30), []
    for way in (lambda: steps(native, ids.tolist()), lambda: native.prefill(native.new_state(), ids.numpy())):
        native.reset_counters()
        way()
        assert not any(one["spikes"] for one in sites(native).values())
        found.append(np.array([one["nonzero"] for one in sites(native).values()]))
    # what is quantised may round to another side
    assert np.abs(found[0] - found[1]).max() <= (0 if precision in ("fp32", "bf16") else 0.01 * found[0].max())


# States


@pytest.fixture(scope="module", params=["dense fp32", "dense int8", "spiking int8", "spiking int4", "windowed int8"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    kind, precision = request.param.split()
    model = mar_model(**RAGGED) if kind == "dense" else spiking_model(window=20 if kind == "windowed" else 0)
    return engine(model, tmp_path_factory.mktemp("native"), precision, head=precision)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal but for rounding, which may flip single codes of what is quantised or spikes."""
    return bool(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()) < 0.02)


@pytest.mark.parametrize("lengths", [(1, 99), (99, 1), (50, 50), (3, 64, 33), (1, 1, 98), (64, 36)], ids=str)
def test_any_split_of_a_prompt(native: Engine, lengths: tuple[int, ...]):
    ids = tokens(100)
    whole, state = native.new_state(), native.new_state()
    expected = native.prefill(whole, ids.numpy())
    for part in ids.split(lengths):  # type: ignore[arg-type]
        found = native.prefill(state, part.numpy())
    assert close(found, expected)
    assert close(state.ssm(), whole.ssm())
    assert close(state.conv(), whole.conv())
    assert not state.window().size or close(state.window(), whole.window())
    assert state.tokens == whole.tokens == 100


@pytest.mark.parametrize("length", [2, 255, 256, 257, 513])
def test_prompts_about_the_size_of_a_block(native: Engine, length: int):
    ids = tokens(length).numpy()
    every, last, state = native.logits(native.new_state(), ids), native.prefill(state := native.new_state(), ids), state
    assert every.shape == (length, 300)
    assert np.array_equal(every[-1], last)
    assert state.tokens == length
    assert close(steps(native, ids[:300].tolist()), every[:300])


def test_copies_are_independent(native: Engine):
    ids = tokens(20)
    state = native.new_state()
    native.prefill(state, ids.numpy())
    fork, kept = state.copy(), state.copy()
    before = state.conv().copy(), state.ssm().copy(), state.window().copy()
    ahead = [native.step(fork, token) for token in (1, 2, 3)]
    assert np.array_equal(state.conv(), before[0])
    assert np.array_equal(state.ssm(), before[1])
    assert np.array_equal(state.window(), before[2])
    assert (fork.tokens, state.tokens) == (23, 20)
    assert all(np.array_equal(native.step(state, token), one) for token, one in zip((1, 2, 3), ahead, strict=True))
    assert not np.array_equal(native.step(kept, 5), ahead[0])


def test_views_of_a_state_outlive_it(native: Engine):
    state = native.new_state()
    native.prefill(state, [1, 2, 3])
    view, copied = state.ssm(), state.ssm().copy()
    del state
    np.zeros(view.size)
    assert np.array_equal(view, copied)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_batch_of_sequences_is_each_by_itself(native: Engine, count: int):
    ids = tokens(4 * count, seed=count).view(4, count)
    together, alone = ([native.new_state() for _ in range(count)] for _ in range(2))
    for row in ids.tolist():
        found = native.step_batch(together, row)
        expected = np.stack([native.step(state, token) for state, token in zip(alone, row, strict=True)])
        assert found.shape == (count, 300)
        if native.settings["precision"] == "int8":
            assert np.array_equal(found, expected)
        assert close(found, expected)
    assert {state.tokens for state in together} == {4}


def test_sequences_of_different_length_go_on_together(native: Engine):
    states = [native.new_state() for _ in range(3)]
    for length, state in zip((0, 5, 70), states, strict=True):
        if length:
            native.prefill(state, tokens(length, seed=length).numpy())
    alone = [native.step(state.copy(), 9) for state in states]
    assert close(native.step_batch(states, [9, 9, 9]), np.stack(alone))
    assert [state.tokens for state in states] == [1, 6, 71]


def test_any_number_of_threads_gives_the_same(tmp_path: Path):
    model = spiking_model(num_heads=4, window=16)  # no thread count divides all of 4 heads, 40, 200 and 300
    ids = tokens(300)
    found: dict[int, list[np.ndarray]] = {}
    for threads in range(1, 6):
        native = engine(model, tmp_path, "int8", threads=threads)
        state = native.new_state()
        found[threads] = [native.logits(state, ids.numpy()), state.ssm().copy()]
        found[threads] += [native.step(state, token) for token in range(12)]
        found[threads] += [
            native.step_batch([state.copy() for _ in range(9)], range(9)),
            native.prefill(state, ids[:5].numpy()),
        ]
        found[threads] += [np.array([[one["spikes"], one["nonzero"]] for one in sites(native).values()])]
    for threads in range(2, 6):
        assert all(np.array_equal(*both) for both in zip(found[1], found[threads], strict=True))


def test_states_are_saved_and_read(native: Engine, tmp_path: Path):
    state = native.new_state()
    native.prefill(state, tokens(30).numpy())
    native.save_state(state, tmp_path / "prompt.state")
    back = native.load_state(tmp_path / "prompt.state")
    assert back.tokens == 30
    assert np.array_equal(back.conv(), state.conv())
    assert np.array_equal(back.ssm(), state.ssm())
    assert np.array_equal(back.window(), state.window())
    assert np.array_equal(native.step(back, 4), native.step(state, 4))


def test_damaged_and_foreign_states_are_refused(native: Engine, tmp_path: Path):
    file = tmp_path / "prompt.state"
    native.save_state(native.new_state(), file)
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    cut = [whole[:place] for place in (0, 1, 10, 200, len(whole) // 2, len(whole) - 30)]
    others = [b"hello", b"\x80\x04K\x01.", bytes(100), b"PK\x03\x04" + bytes(50)]
    for content in (*cut, *others):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no state \(.*\); save it again"):
            native.load_state(file)
    for place in random.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        try:  # zip has bytes that mean nothing; all others are covered by its sums
            state = native.load_state(file)
        except ValueError as error:
            assert str(error).endswith("save it again.")  # noqa: PT017
        else:
            assert not state.conv().any()
            assert not state.ssm().any()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(file)
    with pytest.raises(ValueError, match="holds no state"):
        native.load_state(file)
    np.savez(tmp_path / "some.npz", conv=np.zeros(3))
    with pytest.raises(ValueError, match="holds no state"):
        native.load_state(tmp_path / "some.npz")
    with pytest.raises(FileNotFoundError):
        native.load_state(tmp_path / "nothing")


@pytest.mark.parametrize(
    "changes",
    [{"tokens": np.int64(-1)}, {"tokens": np.int64(2**63 - 3)}, {"tokens": np.float64(3.7)},
     {"tokens": np.float64(1e30)}, {"ssm": np.nan}, {"conv": np.inf}],
)  # fmt: skip
def test_states_that_no_text_leaves_behind_are_refused(native: Engine, tmp_path: Path, changes: dict[str, Any]):
    native.save_state(native.new_state(), tmp_path / "a.state")
    with np.load(tmp_path / "a.state") as found:
        parts = dict(found)
    for name, value in changes.items():
        parts[name] = np.full(parts[name].shape, value, np.asarray(parts[name]).dtype if name != "tokens" else None)
    with open(tmp_path / "b.state", "wb") as file:
        np.savez(file, **parts)
    with pytest.raises(ValueError, match=r"b\.state holds a state that no text leaves behind; save it again"):
        native.load_state(tmp_path / "b.state")


def test_a_state_counts_no_fewer_than_no_tokens(native: Engine):
    with pytest.raises(ValueError, match=r"tokens must be from 0 to 2\^53"):
        native.new_state().set_tokens(-5)


@pytest.mark.parametrize("threads", [0, -1, 257, 1 << 31, 1 << 80, -(1 << 80)])
def test_impossible_numbers_of_threads_are_refused(native: Engine, threads: int):
    with pytest.raises(ValueError, match=f"threads is {threads}; use 1 to 256"):
        Engine(native.packed, threads)


def test_fewer_than_no_tokens_are_refused(native: Engine):
    assert native.generate([1], 0) == []
    with pytest.raises(ValueError, match="max_new_tokens is -1; use 0 or more"):
        native.generate([1], -1)


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float):
    logits = np.array([1, 3, 2, -50], np.float32)
    assert sample(logits, temperature, 1.0, None, np.random.default_rng(0)) == 1


def test_another_models_state_is_refused(native: Engine, tmp_path: Path):
    other = engine(mar_model(seed=5, **RAGGED), tmp_path)
    other.save_state(other.new_state(), tmp_path / "other.state")
    with pytest.raises(ValueError, match=r"holds the state of another model; use it with that model\."):
        native.load_state(tmp_path / "other.state")


def test_32_thousand_tokens(tmp_path: Path):
    model = mar_model(num_hidden_layers=1)
    native = engine(model, tmp_path)
    ids = tokens(2**15, vocabulary=96)
    state = native.new_state()
    last = native.prefill(state, ids.numpy())
    assert state.tokens == 2**15
    with torch.no_grad():
        expected = model(ids[None], logits_to_keep=1).logits[0, 0].numpy()
    assert np.abs(last - expected).max() < 1e-3


# Tokens in, tokens out


def test_no_tokens_and_unknown_ones_are_refused(native: Engine):
    state = native.new_state()
    for empty in ([], np.array([], np.int32), np.array([])):
        with pytest.raises(ValueError, match="There are no tokens; give at least one"):
            native.prefill(state, empty)
        with pytest.raises(ValueError, match="There are no tokens"):
            native.logits(state, empty)
    for token in (300, -1, 2**31, 2**40, 2**70):
        with pytest.raises(ValueError, match=rf"Token {token} is not in the vocabulary; use integers from 0 to 299\."):
            native.prefill(state, [1, token, 2])
    arrays = [np.array([2**32 + 5]), np.array([1, 300], np.uint16), np.array([-1], np.int8), np.array([2**70])]
    for ids in (*arrays, np.array([0.5, 1.5]), np.array([1.0]), np.array([True]), np.array(["a"]), np.array([None])):
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            native.logits(state, ids)
    for several in (np.ones((2, 3), int), np.array(1)):
        with pytest.raises(ValueError, match=r"ids have shape .*; give one sequence"):
            native.logits(state, several)
    with pytest.raises(ValueError, match="Token 300 is not in the vocabulary"):
        native.step(state, 300)
    with pytest.raises(ValueError, match="Token -1 is not in the vocabulary"):
        native.score([1, -1])
    with pytest.raises(ValueError, match="Token -1 is not in the vocabulary"):
        native.step_codes(state, -1)
    with pytest.raises(ValueError, match="2 states do not go with 1 tokens"):
        native.step_batch([state, native.new_state()], [1])
    with pytest.raises(ValueError, match="1 states do not go with 2 tokens"):
        native.step_batch([state], [1, 2])
    with pytest.raises(ValueError, match="There are no tokens"):
        native.step_batch([], [])
    with pytest.raises(ValueError, match="given more than once; copy it"):
        native.step_batch([state, state], [1, 2])
    assert state.tokens == 0
    assert not state.ssm().any()


@pytest.mark.parametrize("ids", [[7], (7, 8), range(5), np.arange(4, dtype=np.uint8), np.arange(8)[::2]])
def test_tokens_come_in_many_forms(native: Engine, ids: Any):
    plain = [int(token) for token in ids]
    expected = native.prefill(native.new_state(), plain)
    assert np.array_equal(native.prefill(native.new_state(), ids), expected)


def test_scores_are_torchs(tmp_path: Path):
    model = mar_model(**RAGGED)
    native = engine(model, tmp_path)
    ids = tokens(600)
    expected = torch.from_numpy(run_torch(model, ids)[0][:-1]).log_softmax(-1)
    expected = expected.gather(1, ids[1:, None])[:, 0].numpy()
    found = native.score(ids.numpy())
    assert np.abs(found - expected).max() < 1e-3
    for length in (257, 258, 2):
        assert np.abs(native.score(ids[:length].tolist()) - expected[: length - 1]).max() < 1e-3
    assert native.score([5]).shape == native.score([]).shape == (0,)


def test_stream_stops_goes_on_and_repeats(native: Engine):
    prompt = tokens(10).tolist()
    whole = native.generate(prompt, 12, temperature=0)
    assert len(whole) == 12
    assert native.generate(prompt, 0) == []
    stop = whole[5]
    assert native.generate(prompt, 12, temperature=0, stop=[stop]) == whole[: whole.index(stop) + 1]
    state = native.new_state()
    first = native.generate(prompt, 4, temperature=0, state=state)
    assert state.tokens == 10 + 3
    assert first + native.generate(first[-1:], 8, temperature=0, state=state) == whole
    drawn = [native.generate(prompt, 12, seed=seed, top_p=0.95, top_k=50) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="temperature -1"):
        native.generate(prompt, 1, temperature=-1.0)


def chances(logits: np.ndarray, temperature: float, top_p: float, top_k: int | None) -> np.ndarray:
    """The definition: the likeliest k, of these the fewest that make up p, each by its share."""
    order = np.argsort(-logits)[: top_k or len(logits)]
    share = np.exp((logits[order] - logits.max()) / temperature)
    share /= share.sum()
    share[np.searchsorted(share.cumsum(), top_p) + 1 :] = 0
    found = np.zeros(len(logits))
    found[order] = share / share.sum()
    return found


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, None), (0.5, 1.0, 3), (1.5, 0.6, None), (0.8, 0.7, 4), (1.0, 1e-9, 5)],
)
def test_samples_follow_their_chances(temperature: float, top_p: float, top_k: int | None):
    logits = np.array([0.3, 2.0, -1.0, 1.1, 0.9, -0.5, 1.6], np.float32)
    random = np.random.default_rng(0)
    drawn = [sample(logits, temperature, top_p, top_k, random) for _ in range(4000)]
    share = np.bincount(drawn, minlength=len(logits)) / len(drawn)
    expected = chances(logits, temperature, top_p, top_k)
    assert not share[expected == 0].any()
    assert np.abs(share - expected).max() < 4.5 * np.sqrt(0.25 / len(drawn))


def test_the_likeliest_is_taken_at_temperature_0():
    assert sample(np.array([1, 3, 2], np.float32), 0, 1.0, None, np.random.default_rng()) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}],
    ids=str,
)
def test_sampling_that_is_none_is_refused(wrong: dict[str, float]):
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": None, **wrong}
    with pytest.raises(ValueError, match="are no sampling; use temperature from 0"):
        sample(np.zeros(3, np.float32), random=np.random.default_rng(0), **settings)


# Engines and processes


def test_two_engines_in_two_threads(tmp_path: Path):
    folders = [saved(spiking_model(seed), tmp_path / str(seed)) for seed in (0, 1)]
    engines = [Engine.from_pretrained(folder, cache=tmp_path, threads=2) for folder in folders]
    prompt = tokens(30).tolist()

    def write(native: Engine) -> list[int]:
        return native.generate(prompt, 60, seed=3)

    alone = [write(native) for native in engines]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, engines * 2)) == alone * 2


def test_a_forked_process_has_threads_of_its_own(tmp_path: Path):
    native = engine(mar_model(), tmp_path, threads=2)
    expected = native.generate([1, 2, 3], 5, temperature=0)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            found = native.generate([1, 2, 3], 5, temperature=0)
            del native  # whose threads are not here to be waited for
            os.write(writing, bytes(found))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        assert list(answer.read()) == expected
    assert os.waitpid(child, 0)[1] == 0
    assert native.generate([1, 2, 3], 5, temperature=0) == expected


def test_the_results_are_the_callers_own(native: Engine):
    state = native.new_state()
    first = native.step(state, 1)
    kept = first.copy()
    native.step(state, 2)
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("precision", pack.PRECISIONS)
@pytest.mark.parametrize("head", pack.HEADS)
def test_every_pair_of_precisions_runs(precision: str, head: str, tmp_path: Path):
    model = spiking_model(tie_word_embeddings=True)
    native = engine(model, tmp_path, precision, head=head)
    expected, codes, _ = run_torch(model, ids := tokens(20))
    state = native.new_state()
    pairs = zip(ids.tolist(), codes, strict=True)
    found = np.stack([native.step_codes(state, token, row)[0] for token, row in pairs])
    limits = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.08, "int4": 0.6, pack.TWO_STEP: 0.6}
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
    assert error < max(limits[precision], limits[head])


def test_a_head_in_two_steps_is_exact_near_the_best_word(tmp_path: Path):
    """Against the same int8 weights as values in fp32; on logits of which some are near and some far."""
    model = spiking_model(tie_word_embeddings=True, vocab_size=300)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
        model.model.norm.weight[3] = 40  # one large channel, as trained models have
    two_step = engine(model, tmp_path, "fp32", head=pack.TWO_STEP)
    head = model.get_output_embeddings().weight
    rounded = quantise(head.detach().numpy(), "int8").values()
    with torch.no_grad():
        head.copy_(torch.from_numpy(rounded))
    exact = engine(model, tmp_path / "exact", "fp32")
    mine, other, prefilled = two_step.new_state(), exact.new_state(), two_step.new_state()
    far = []
    for token in (ids := tokens(40).tolist()):
        found, wanted = two_step.step(mine, token), exact.step(other, token)
        near = wanted > wanted.max() - 4
        assert np.abs(found - wanted)[near].max() < 1e-3 * np.abs(wanted).max()
        assert found.argmax() == wanted.argmax()
        far.append(np.abs(found - wanted)[~near] / np.abs(wanted).max())
    assert 0.001 < np.concatenate(far).mean() < 0.05, "int4 words are near, and not exact"
    assert np.allclose(two_step.prefill(prefilled, ids), found, atol=1e-2 * np.abs(found).max())


def test_a_head_in_two_steps_is_whole_wherever_all_logits_are_asked_for(tmp_path: Path):
    """Also where a block or a batch has a single token left."""
    model = mar_model(**RAGGED)
    two_step, plain = (engine(model, tmp_path / head, "fp32", head=head) for head in (pack.TWO_STEP, "int8"))
    ids = tokens(257).numpy()
    assert np.array_equal(*(one.logits(one.new_state(), ids) for one in (two_step, plain)))
    assert np.array_equal(*(one.score(ids[:2]) for one in (two_step, plain)))
    many = [[one.new_state() for _ in range(257)] for one in (two_step, plain)]
    found = [one.step_batch(states, ids.tolist()) for one, states in zip((two_step, plain), many, strict=True)]
    assert np.array_equal(*found)
    assert not np.array_equal(*(one.step(one.new_state(), 5) for one in (two_step, plain)))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_the_likeliest_are_those_of_a_full_sort(share: float):
    random = np.random.default_rng(0)
    for size in (1, 7, 5000):
        chances = np.exp(np.minimum(0, random.normal(-4, 3, size))).astype(np.float32)
        chances[random.integers(size)] = 1
        ranks = np.argsort(-chances, kind="stable")
        sums = chances[ranks].cumsum(dtype=np.float64)
        wanted = ranks[: int(np.searchsorted(sums, share * chances.sum(dtype=np.float64))) + 1]
        assert np.array_equal(_likeliest(chances, share), wanted)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(spoilt: float):
    logits = np.array([1, spoilt, 2], np.float32)
    for top_p in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"^The logits are not numbers; .*restore it\.$"):
            sample(logits, 0.7, top_p, None, np.random.default_rng(0))


def test_whatever_a_config_leaves_out_has_torchs_default(tmp_path: Path):
    """Neurons given by a few fields only are what mar.config makes of them."""
    full = spiking_model(neurons={site: asdict(NeuronConfig(**given)) for site, given in SPIKING.items()})
    short = spiking_model(neurons=SPIKING)
    ids = tokens(10).numpy()
    both = [engine(model, tmp_path / name) for name, model in (("full", full), ("short", short))]
    assert np.array_equal(*[native.logits(native.new_state(), ids) for native in both])


def test_the_engine_imports_neither_torch_nor_transformers(native: Engine):
    code = (
        "import sys; from mar.engine import Engine\n"
        "engine = Engine(__import__('pathlib').Path(sys.argv[1]), 1)\n"
        "print(engine.generate([1, 2, 3], 5, temperature=0))\n"
        "print({'torch', 'transformers', 'mar.config', 'mar.kernels'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(native.packed)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(native.generate([1, 2, 3], 5, temperature=0)), "set()"], done.stderr


def test_a_packed_file_that_holds_no_model_is_refused(tmp_path: Path):
    for settings in ({}, {"vocab_size": 2**70}, {"vocab_size": 8}, {"num_hidden_layers": "two"}):
        pack.write_packed(tmp_path / "none.marpack", settings, {"norm": np.zeros(4, np.uint8)}, {})
        with pytest.raises(ValueError, match=r"^The setting '\w+' is missing or of another type; pack .* again\.$"):
            Engine(tmp_path / "none.marpack", 1)


def test_a_missing_core_is_named():
    code = "import sys; sys.modules['mar._native'] = None; import mar.engine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ImportError: mar was installed without its native core, which mar.engine needs; install" in done.stderr


def test_threads_are_those_of_the_process_by_default(tmp_path: Path):
    import os

    native = Engine.from_pretrained(saved(mar_model(), tmp_path / "model"), cache=tmp_path)
    assert native.threads == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="threads is 0; use 1 to 256"):
        Engine.from_pretrained(tmp_path / "model", cache=tmp_path, threads=0)


def test_fidelity_benchmark(tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]):
    model = spiking_model(vocab_size=320)
    saved(model, tmp_path / "student")
    PreTrainedTokenizerFast.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("The river rose during the night and nobody asked why. " * 20)
    arguments = ["--json", str(tmp_path / "student"), "--text", str(tmp_path / "text.txt"), "--threads", "1"]
    engine_fidelity.main([*arguments, "--tokens", "100", "--window", "50", "--precisions", "fp32", "int4"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 100
    assert found["codes"] == 100 * 2 * (40 + 24 + 40 + 200)
    runs = found["runs"]
    assert set(runs) == {"torch_in_pieces", "fp32", "int4"}
    assert runs["fp32"]["replayed"]["away_from_thresholds"] == 0
    assert runs["fp32"]["replayed"]["largest_logit_difference"] < 1e-3
    assert len(runs["int4"]["free"]["first_flips"]) == 2
    for figure in ("flipped_share", "kl"):
        assert found["bound"][figure] == pytest.approx(1.25 * runs["torch_in_pieces"]["free"][figure])
        assert 0 <= runs["fp32"]["free"][figure] < runs["int4"]["free"][figure] / 10
        assert runs["torch_in_pieces"]["free"][figure] < runs["int4"]["free"][figure] / 10
    flipped = runs["int4"]["free"]
    places = {"in_proj": 40, "out_proj": 24, "gate_up": 40, "down_proj": 200}
    by_site = sum(flipped["flipped_share_by_site"][site] * width * 200 for site, width in places.items())
    assert by_site == pytest.approx(flipped["flipped"])
    assert flipped["flipped_share"] == pytest.approx(flipped["flipped"] / found["codes"])
