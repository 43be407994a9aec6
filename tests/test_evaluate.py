"""Held-out figures against whole-logits formulas, and every statistic against a case worked out by hand."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mar.config import MarConfig
from mar.evaluate import compare_tasks, held_out, kept_above_chance, resampled_means
from mar.model import MarForCausalLM
from mar.tasks import PAPER_METRICS, ItemResult, TaskResults

VOCABULARY = 64


def llama(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def near(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that often, but not always, agrees with `model`."""
    copy = deepcopy(model)
    copy.lm_head.weight.data += 0.15 * torch.randn(
        copy.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)
    )
    return copy


def mar() -> MarForCausalLM:
    torch.manual_seed(0)
    config = MarConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_heads=4, head_dim=8,
        state_size=8, chunk_size=8,
    )  # fmt: skip
    return MarForCausalLM(config)


def stream(length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def test_uniform_model_has_the_vocabulary_as_perplexity():
    uniform = llama()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    teacher = llama(1)
    tokens = stream(64)
    result = held_out({"uniform": uniform}, teacher, tokens, window=16)["uniform"]
    assert result.ppl.value == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.ppl.low == pytest.approx(VOCABULARY, rel=1e-5)
    # KL(p || uniform) = log V - entropy of p, for each predicted position.
    log_p = teacher(tokens.view(4, 16)).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert result.kl.value == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-4)


def test_teacher_against_itself():
    teacher = llama()
    result = held_out({"same": teacher}, teacher, stream(64), window=16)["same"]
    assert result.kl.value == pytest.approx(0, abs=1e-6)
    assert result.reverse_kl.value == pytest.approx(0, abs=1e-6)
    assert result.agreement.value == 1
    assert result.ppl_ratio.value == pytest.approx(1, abs=1e-6)
    assert (result.agreement.low, result.agreement.high) == (1, 1)


def test_figures_equal_those_of_whole_logits():
    teacher, tokens = llama(), stream(83)
    students = {"near": near(teacher), "mar": mar()}
    results = held_out(students, teacher, tokens, window=16, batch=2)
    ids = tokens[:80].view(5, 16)
    log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    labels = ids[:, 1:, None]
    for name, student in students.items():
        log_q = student.eval()(ids).logits[:, :-1].log_softmax(-1)
        result = results[name]
        assert result.ppl.value == pytest.approx((-log_q.gather(-1, labels)).mean().exp().item(), rel=1e-4)
        assert result.teacher_ppl.value == pytest.approx((-log_p.gather(-1, labels)).mean().exp().item(), rel=1e-4)
        assert result.kl.value == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)
        assert result.reverse_kl.value == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-3)
        assert result.agreement.value == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
        assert result.ppl_ratio.value == pytest.approx(result.ppl.value / result.teacher_ppl.value)


def test_window_accounting_and_record():
    seen = []
    result = held_out(
        {"student": llama(1)}, llama(), stream(83), window=16, batch=2, text="essay", against="big",
        progress=lambda done, total: seen.append((done, total)),
    )["student"]  # fmt: skip
    assert (result.window, result.windows, result.tokens) == (16, 5, 75)
    assert (result.student, result.text, result.against, result.precision) == ("student", "essay", "big", "fp32")
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert json.loads(json.dumps(result.to_dict()))["kl"]["value"] == result.kl.value
    assert [row["figure"] for row in result.rows()][:2] == ["ppl", "teacher_ppl"]
    assert all(row["against"] == "big" for row in result.rows())


def test_interval_covers_the_value_and_batches_do_not_matter():
    teacher, tokens = llama(), stream(160)
    student = near(teacher)
    one = held_out({"s": student}, teacher, tokens, window=16, batch=1)["s"]
    many = held_out({"s": student}, teacher, tokens.view(10, 16), batch=7)["s"]
    for figure in ("ppl", "ppl_ratio", "kl", "agreement"):
        estimate = getattr(one, figure)
        assert estimate.low < estimate.value < estimate.high
        assert estimate.value == pytest.approx(getattr(many, figure).value, rel=1e-5)
        assert estimate.low == pytest.approx(getattr(many, figure).low, rel=1e-4)


def test_one_window_has_no_interval():
    result = held_out({"s": llama(1)}, llama(), stream(16), window=16)["s"]
    assert result.kl.value > 0
    assert (result.kl.low, result.kl.high) == (None, None)
    assert "one window" in result.kl.note


def test_bf16_is_near_fp32_and_modes_come_back():
    teacher, student, tokens = llama(), mar().train(), stream(64)
    exact = held_out({"s": student}, teacher, tokens, window=16)["s"]
    rough = held_out({"s": student}, teacher, tokens, window=16, precision="bf16")["s"]
    assert rough.precision == "bf16"
    assert rough.ppl.value == pytest.approx(exact.ppl.value, rel=0.02)
    assert rough.ppl.value != exact.ppl.value
    assert student.training
    assert not teacher.training


def test_documents_of_packed_rows_are_read_apart():
    """Documents of 5, 7 and 12 tokens in two rows: as from each document alone, with 4, 6 and 11 predicted tokens."""
    teacher, rows = llama(), stream(24).view(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    students = {"near": near(teacher), "mar": mar()}
    packed = held_out(students, teacher, rows, document_ids=documents)
    parts = [rows[:1, :5], rows[:1, 5:], rows[1:]]
    apart = [held_out(students, teacher, part) for part in parts]
    for name in students:
        assert packed[name].tokens == 21
        for figure in ("kl", "agreement"):
            mean = sum(n * getattr(one[name], figure).value for n, one in zip((4, 6, 11), apart, strict=True)) / 21
            assert getattr(packed[name], figure).value == pytest.approx(mean, rel=1e-4)
        nll = sum(n * math.log(one[name].ppl.value) for n, one in zip((4, 6, 11), apart, strict=True)) / 21
        assert packed[name].ppl.value == pytest.approx(math.exp(nll), rel=1e-4)
    whole = held_out(students, teacher, rows)
    assert whole["near"].kl.value != pytest.approx(packed["near"].kl.value, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"document_ids": torch.zeros(1, 16, dtype=torch.long)}, r"rows \(2, 16\) and document_ids \(1, 16\)"),
        ({"document_ids": torch.arange(32).view(2, 16)}, "only documents of one token"),
        ({"tokens": stream(15)}, "too few tokens for one window of 16"),
        ({"tokens": torch.empty(0, dtype=torch.long)}, "too few tokens"),
        ({"window": 1}, "window is 1"),
        ({"tokens": stream(16) + VOCABULARY}, "outside a vocabulary of 64"),
        ({"students": {"other": llama(0, 32)}}, "'other' has 32 words and 'teacher' has 64"),
        ({"precision": "fp8"}, "precision is 'fp8'; use one of fp32, bf16"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(arguments, message):
    given = {"students": {"s": llama()}, "tokens": stream(32), "window": 16} | arguments
    with pytest.raises(ValueError, match=message):
        held_out(teacher=llama(), **given)


def test_broken_student_is_named():
    broken = llama()
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"'broken'.*not finite"):
        held_out({"broken": broken}, llama(1), stream(32), window=16)


def test_resampled_means_of_two_items():
    """Two items 0 and 1: a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    means = resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), np.random.default_rng(0), 40_000)
    values, counts = np.unique(means[:, 0], return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(counts / 40_000, [0.25, 0.5, 0.25], atol=0.01)
    np.testing.assert_allclose(means.sum(1), 1)  # both columns see the same rows


def test_resampled_means_spread_as_the_standard_error(monkeypatch):
    values = np.random.default_rng(1).normal(size=(400, 1))
    whole = resampled_means(values, np.random.default_rng(0), 4_000)
    assert whole.mean() == pytest.approx(values.mean(), abs=0.003)
    assert whole.std() == pytest.approx(values.std() / 20, rel=0.05)
    monkeypatch.setattr("mar.evaluate._RESAMPLE_CELLS", 1_000)
    pieces = resampled_means(values, np.random.default_rng(0), 4_000)
    np.testing.assert_allclose(whole, pieces, atol=1e-12)  # bounding the memory changes nothing but rounding


def test_kept_above_chance_on_the_papers_numbers():
    table = {"hellaswag": (50.91, 61.31, 25.0), "arc_easy": (67.21, 69.57, 25.0), "piqa": (70.35, 73.78, 50.0)}
    kept = {task: kept_above_chance(*numbers) for task, numbers in table.items()}
    assert {task: round(100 * value, 1) for task, value in kept.items()} == {
        "hellaswag": 71.4, "arc_easy": 94.7, "piqa": 85.6,
    }  # fmt: skip
    assert 100 * np.mean(list(kept.values())) == pytest.approx(83.9, abs=0.05)
    assert kept_above_chance(0.3, 0.25, 0.25) is None
    assert kept_above_chance(0.3, 0.2, 0.25) is None


def answers(task: str, choices: int, right: list[bool]) -> list[ItemResult]:
    """Items whose right choice is 0: the model picks 0 where `right`, else 1."""
    items = []
    for number, hit in enumerate(right):
        loglikelihoods = [-1.0 if hit else -3.0, -2.0, *[-9.0] * (choices - 2)]
        chosen, score = (0, 1.0) if hit else (1, 0.0)
        norm = (chosen, score) if PAPER_METRICS[task] == "acc_norm" else (None, None)
        items.append(ItemResult(number, 0, loglikelihoods, chosen, norm[0], score, norm[1]))
    return items


def results(**tasks: tuple[int, list[bool], list[bool]]) -> TaskResults:
    items = {
        task: {"student": answers(task, choices, student), "teacher": answers(task, choices, teacher)}
        for task, (choices, student, teacher) in tasks.items()
    }
    return TaskResults(items, "hub", None, 0, "fp32", 64, "0")


def test_pairs_by_hand():
    """Four items: teacher right on 1, 2, 3; student on 1, 2, 4. They differ on two items and draw in accuracy."""
    both = results(piqa=(2, [True, True, False, True], [True, True, True, False]))
    (entry,) = compare_tasks(both, "student", "teacher").tasks
    assert (entry.student.value, entry.teacher.value, entry.difference.value) == (0.75, 0.75, 0)
    assert entry.agreement.value == 0.5
    assert (entry.chance, entry.majority, entry.items) == (0.5, 1.0, 4)
    # Per item the difference is 0, 0, -1, 1, so a resample of four runs from -1 to 1.
    assert entry.difference.low == -entry.difference.high == pytest.approx(-0.75, abs=0.26)


def test_pairing_cancels_what_both_find_hard():
    right = [True, False] * 30
    same = compare_tasks(results(piqa=(2, right, right)), "student", "teacher").tasks[0]
    assert same.student.low < 0.45
    assert (same.difference.low, same.difference.high, same.agreement.low) == (0, 0, 1)


def test_teacher_near_chance_leaves_the_ratio_undefined():
    near = [True, False] * 20 + [True]
    entry = compare_tasks(results(piqa=(2, [True] * 41, near)), "student", "teacher").tasks[0]
    assert (entry.kept.value, entry.kept.low, entry.kept.high) == (None, None, None)
    assert "the teacher (0.512) is not clearly above chance (0.500)" in entry.kept.note


def shares(right: int, of: int) -> list[bool]:
    return [True] * right + [False] * (of - right)


def test_kept_retention_and_means_over_tasks():
    """Kept: (.75-.25)/(1-.25), (.5-.25)/(.75-.25), (.7-.5)/(.9-.5) = 2/3, 1/2, 1/2."""
    full = results(
        piqa=(2, shares(70, 100), shares(90, 100)),
        boolq=(2, shares(50, 100), shares(60, 100)),
        winogrande=(2, shares(55, 100), shares(65, 100)),
        hellaswag=(4, shares(75, 100), shares(100, 100)),
        arc_easy=(4, shares(50, 100), shares(75, 100)),
        arc_challenge=(4, shares(30, 100), shares(40, 100)),
    )
    comparison = compare_tasks(full, "student", "teacher")
    kept = {entry.task: entry.kept.value for entry in comparison.tasks if entry.in_table}
    assert kept["hellaswag"] == pytest.approx(2 / 3)
    assert kept["arc_easy"] == pytest.approx(1 / 2)
    assert kept["piqa"] == pytest.approx(1 / 2)
    assert comparison.kept.value == pytest.approx(5 / 9)
    assert comparison.kept.low < 5 / 9 < comparison.kept.high < 1
    assert comparison.student_mean.value == pytest.approx(3.3 / 6)
    assert comparison.teacher_mean.value == pytest.approx(4.3 / 6)
    assert comparison.retention.value == pytest.approx(3.3 / 4.3)
    assert comparison.retention.low < 3.3 / 4.3 < comparison.retention.high
    # HellaSwag and ARC also have plain accuracy beside the normed one, and only one of the two is the table's.
    assert [(entry.metric, entry.in_table) for entry in comparison.tasks if entry.task == "arc_easy"] == [
        ("acc", False), ("acc_norm", True),
    ]  # fmt: skip
    record = json.loads(json.dumps(comparison.to_dict()))
    assert record["against"] == "teacher"
    assert comparison.rows()[0]["kept_low"] == comparison.tasks[0].kept.low
    assert compare_tasks(full, "student", "teacher") == comparison


def test_missing_tasks_leave_the_means_undefined():
    comparison = compare_tasks(results(piqa=(2, shares(70, 100), shares(90, 100))), "student", "teacher")
    assert comparison.retention.value is None
    assert comparison.retention.note == ("undefined: boolq, winogrande, hellaswag, arc_easy, arc_challenge was not run")
    assert comparison.kept.note == "undefined: hellaswag, arc_easy was not run"


def test_unknown_model_is_one_sentence():
    with pytest.raises(ValueError, match="'spiking' was not run on piqa; run were student, teacher"):
        compare_tasks(results(piqa=(2, [True], [True])), "spiking", "teacher")
