"""Losses: hand-worked cases, trl's stored values, chunked against whole, gradients in fp64, bounded memory."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mar import losses

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
ORACLE = Path(__file__).parent / "assets" / "losses" / "trl_oracle.json"

# Teacher p = (3/4, 1/4), student q = (1/2, 1/2):
#   KL(p || q) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812...
#   KL(q || p) = 1/2 ln(2/3) + 1/2 ln(2) = 1/2 ln(4/3) = 0.143841...
FORWARD, REVERSE = 0.1308120, 0.1438410
P, Q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])


def problem(n=37, vocab=50, d=6, e=9, dtype=torch.float64, seed=0, spread=1.0) -> Tensors:
    """Student hidden (n, d), head (vocab, d), both requiring gradients; teacher hidden (n, e), head (vocab, e)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (vocab, d), (n, e), (vocab, e))
    tensors = [(spread * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3]


def whole(student_hidden, student_head, teacher_hidden, teacher_head, alpha, beta, weight=None):
    """The same loss by autograd over all logits."""
    per_token = losses.bidirectional_kl(
        teacher_hidden @ teacher_head.t(), student_hidden @ student_head.t(), alpha, beta
    )
    return per_token.mean() if weight is None else (weight * per_token).sum() / weight.sum()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Recorder(TorchDispatchMode):
    """Notes the largest tensor that any operation returns and the dtypes that enter matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.product_dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if "mm" in func.__name__:
            self.product_dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return result


class TestHandCase:
    def test_forward_is_teacher_to_student(self):
        torch.testing.assert_close(losses.forward_kl(P.log(), Q.log()), torch.tensor([FORWARD]), atol=1e-6, rtol=0)

    def test_reverse_is_student_to_teacher(self):
        torch.testing.assert_close(losses.reverse_kl(P.log(), Q.log()), torch.tensor([REVERSE]), atol=1e-6, rtol=0)

    def test_alpha_weighs_forward_and_beta_reverse(self):
        value = losses.bidirectional_kl(P.log(), Q.log(), alpha=0.2, beta=0.7)
        torch.testing.assert_close(value, torch.tensor([0.2 * FORWARD + 0.7 * REVERSE]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.2, 0.7)])
    def test_from_hidden_states_with_gradient(self, alpha, beta):
        hidden = Q.log().double().requires_grad_()
        eye = torch.eye(2, dtype=torch.float64)
        loss = losses.chunked_bidirectional_kl(hidden, eye, P.log().double(), eye, alpha, beta)
        assert loss.item() == pytest.approx(alpha * FORWARD + beta * REVERSE, abs=1e-6)
        # alpha (q - p) + beta q (ln(q / p) - KL(q || p)) for the first outcome; the two sum to 0.
        first = alpha * (0.5 - 0.75) + beta * 0.5 * (math.log(2 / 3) - REVERSE)
        (grad,) = gradients(loss, hidden)
        torch.testing.assert_close(grad, torch.tensor([[first, -first]], dtype=torch.float64), atol=1e-6, rtol=0)

    def test_compare_hidden(self):
        eye = torch.eye(2)
        result = losses.compare_hidden(Q.log() + 5, eye, P.log() - 3, eye, torch.tensor([1]))
        expected = {"kl": FORWARD, "reverse_kl": REVERSE, "student_nll": math.log(2), "teacher_nll": math.log(4)}
        for name, value in expected.items():
            assert result[name].item() == pytest.approx(value, abs=1e-5), name


class TestPlain:
    def test_trl_oracle(self):
        oracle = json.loads(ORACLE.read_text())
        assert len(oracle["cases"]) == 3
        for case in oracle["cases"]:
            teacher, student = (torch.tensor(case[f"{who}_logits"]).double() for who in ("teacher", "student"))
            forward, reverse = (torch.tensor(case[f"beta_{beta}"]).double() for beta in (0, 1))
            torch.testing.assert_close(losses.forward_kl(teacher, student), forward, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(losses.reverse_kl(teacher, student), reverse, atol=1e-5, rtol=1e-5)
            eye = torch.eye(teacher.shape[1]).double()
            chunked = losses.chunked_bidirectional_kl(student, eye, teacher, eye, 0.2, 0.7, chunk=3)
            torch.testing.assert_close(chunked, (0.2 * forward + 0.7 * reverse).mean(), atol=1e-5, rtol=1e-5)

    @given(st.integers(0, 10**6), st.floats(0, 2), st.floats(0, 2), st.sampled_from([0.1, 1.0, 30.0]))
    def test_is_the_weighted_sum_of_two_divergences(self, seed, alpha, beta, scale):
        generator = torch.Generator().manual_seed(seed)
        teacher, student = (scale * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        forward, reverse = losses.forward_kl(teacher, student), losses.reverse_kl(teacher, student)
        rounding = -1e-12  # of terms that cancel
        assert (forward >= rounding).all()
        assert (reverse >= rounding).all()
        torch.testing.assert_close(losses.reverse_kl(student, teacher), forward)
        mixed = losses.bidirectional_kl(teacher, student, alpha, beta)
        torch.testing.assert_close(mixed, alpha * forward + beta * reverse)

    def test_sixteen_bit_logits_give_fp32(self):
        teacher, student = torch.randn(2, 4, 9).bfloat16().unbind()
        value = losses.forward_kl(teacher, student)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, losses.forward_kl(teacher.double(), student.double()).float())

    def test_teacher_gets_no_gradient(self):
        teacher, student = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
        losses.bidirectional_kl(teacher, student, 0.2, 0.7).sum().backward()
        assert teacher.grad is None
        assert student.grad is not None

    def test_vocabularies_differ(self):
        with pytest.raises(ValueError, match=r"student's vocabulary has 5 words and the teacher's 7;.*tokenizer"):
            losses.forward_kl(torch.zeros(2, 7), torch.zeros(2, 5))


class TestChunked:
    @pytest.mark.parametrize("chunk", [1, 5, 16, 37, 1000])
    @pytest.mark.parametrize("block_elements", [1, 3 * 50, 2**18])
    def test_equals_whole(self, monkeypatch, chunk, block_elements):
        monkeypatch.setattr(losses, "_BLOCK_ELEMENTS", block_elements)
        args = problem()
        value = losses.chunked_bidirectional_kl(*args, 0.2, 0.7, chunk=chunk)
        expected = whole(*args, 0.2, 0.7)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, *args[:2]), gradients(expected, *args[:2]))

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2), (0.0, 0.0)])
    def test_directions_equal_whole(self, alpha, beta):
        args = problem(seed=1)
        value = losses.chunked_bidirectional_kl(*args, alpha, beta, chunk=8)
        expected = whole(*args, alpha, beta)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, *args[:2]), gradients(expected, *args[:2]))

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.2, 0.7)])
    def test_gradient_against_finite_differences(self, alpha, beta):
        hidden, head, teacher_hidden, teacher_head = problem(n=4, vocab=6, d=3, e=2)

        def loss(hidden, head):
            return losses.chunked_bidirectional_kl(hidden, head, teacher_hidden, teacher_head, alpha, beta, chunk=3)

        assert torch.autograd.gradcheck(loss, (hidden, head))

    def test_head_gradient_in_tiles(self):
        # Two and a half tiles of the vocabulary at this width.
        args = problem(n=3, vocab=40, d=2**16)
        args = (args[0].detach().mul_(2**-8).requires_grad_(), *args[1:])
        value, expected = losses.chunked_bidirectional_kl(*args, 0.2, 0.7), whole(*args, 0.2, 0.7)
        torch.testing.assert_close(gradients(value, args[1]), gradients(expected, args[1]))

    def test_weights(self):
        args = problem(seed=2)
        weight = torch.rand(37, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        weight[::3] = 0
        value = losses.chunked_bidirectional_kl(*args, 0.2, 0.7, weight=weight, chunk=8)
        expected = whole(*args, 0.2, 0.7, weight)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, *args[:2]), gradients(expected, *args[:2]))

    def test_mask_of_booleans_drops_tokens_whatever_they_hold(self):
        hidden, head, teacher_hidden, teacher_head = problem()
        mask = torch.arange(37) % 4 != 1
        expected = whole(hidden[mask], head, teacher_hidden[mask], teacher_head, 0.2, 0.7)
        spoiled = hidden.detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
        value = losses.chunked_bidirectional_kl(spoiled, head, teacher_hidden, teacher_head, 0.2, 0.7, weight=mask)
        torch.testing.assert_close(value, expected)
        (grad,) = gradients(value, spoiled)
        torch.testing.assert_close(grad, gradients(expected, hidden)[0])
        assert (grad[~mask] == 0).all()

    def test_no_token_counts(self):
        args = problem()
        value = losses.chunked_bidirectional_kl(*args, 0.2, 0.7, weight=torch.zeros(37))
        assert value.item() == 0
        assert all((grad == 0).all() for grad in gradients(value, *args[:2]))

    def test_scales_with_the_incoming_gradient_and_repeats(self):
        args = problem()
        value = losses.chunked_bidirectional_kl(*args, 0.2, 0.7)
        once = torch.autograd.grad(value, args[:2], retain_graph=True)
        thrice = torch.autograd.grad(3 * value, args[:2], retain_graph=True)
        torch.testing.assert_close(thrice, tuple(3 * grad for grad in once))
        torch.testing.assert_close(torch.autograd.grad(value, args[:2]), once)

    def test_identical_models(self):
        hidden, head, *_ = problem(dtype=torch.float32, spread=3.0)
        value = losses.chunked_bidirectional_kl(hidden, head, hidden.detach(), head.detach(), 0.2, 0.7)
        assert value.item() == 0
        for grad in gradients(value, hidden, head):
            torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)

    def test_extreme_logits(self):
        signs = torch.tensor([[1.0, -1, 0, 1], [-1, 1, 1, 0], [1, 1, -1, -1]])
        student = (1e4 * signs).requires_grad_()
        teacher = 1e4 * signs.flip(1)
        eye = torch.eye(4)
        value = losses.chunked_bidirectional_kl(student, eye, teacher, eye, 0.2, 0.7)
        exact = student.detach().double().requires_grad_()
        expected = whole(exact, eye.double(), teacher.double(), eye.double(), 0.2, 0.7)
        assert expected.item() > 1e3
        torch.testing.assert_close(value, expected.float())
        torch.testing.assert_close(gradients(value, student)[0], gradients(expected, exact)[0].float())
        result = losses.compare_hidden(student, eye, teacher, eye, torch.tensor([0, 1, 3]))
        assert all(values.isfinite().all() for values in result.values())

    def test_nan_is_not_hidden(self):
        args = problem()
        with torch.no_grad():
            args[0][3, 2] = torch.nan
        assert losses.chunked_bidirectional_kl(*args, 0.2, 0.7).isnan()

    def test_only_what_requires_a_gradient_gets_one(self):
        hidden, head, teacher_hidden, teacher_head = problem()
        teacher_hidden.requires_grad_()
        teacher_head.requires_grad_()
        losses.chunked_bidirectional_kl(hidden, head.detach(), teacher_hidden, teacher_head, 0.2, 0.7).backward()
        assert hidden.grad is not None
        assert head.grad is None
        losses.chunked_bidirectional_kl(hidden.detach(), head, teacher_hidden, teacher_head, 0.2, 0.7).backward()
        assert head.grad is not None
        assert teacher_hidden.grad is None
        assert teacher_head.grad is None
        with torch.no_grad():
            assert not losses.chunked_bidirectional_kl(
                hidden, head, teacher_hidden, teacher_head, 0.2, 0.7
            ).requires_grad

    def test_a_tied_head_receives_both_gradients(self):
        embedding = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
        ids = torch.tensor([3, 3, 7, 0, 11])
        _, _, teacher_hidden, teacher_head = problem(n=5, vocab=12)
        value = losses.chunked_bidirectional_kl(embedding[ids], embedding, teacher_hidden, teacher_head, 0.2, 0.7)
        expected = whole(embedding[ids], embedding, teacher_hidden, teacher_head, 0.2, 0.7)
        torch.testing.assert_close(gradients(value, embedding), gradients(expected, embedding))

    @pytest.mark.parametrize("call", ["train", "evaluate"])
    def test_refuses_what_does_not_fit(self, call):
        def run(*tensors: Tensor, chunk=4):
            a, b, c, d = tensors
            if call == "train":
                return losses.chunked_bidirectional_kl(a, b, c, d, 0.2, 0.7, chunk=chunk)
            return losses.compare_hidden(a, b, c, d, torch.zeros(len(a), dtype=torch.long), chunk=chunk)

        hidden, head, teacher_hidden, teacher_head = problem(n=4)
        with pytest.raises(ValueError, match=r"student's vocabulary has 50 words and the teacher's 49;.*tokenizer"):
            run(hidden, head, teacher_hidden, teacher_head[:-1])
        with pytest.raises(ValueError, match="chunk is 0"):
            run(hidden, head, teacher_hidden, teacher_head, chunk=0)


class TestSixteenBits:
    def rounded(self, **kwargs) -> tuple[Tensors, Tensors]:
        """A problem with bf16 hidden states and fp32 heads of bf16 values, and the same numbers in fp64."""
        values = [tensor.detach().bfloat16() for tensor in problem(**kwargs)]

        def as_dtypes(hidden, head):
            a, b, c, d = (value.to(dtype) for value, dtype in zip(values, (hidden, head) * 2, strict=True))
            return a.requires_grad_(), b.requires_grad_(), c, d

        return as_dtypes(torch.bfloat16, torch.float32), as_dtypes(torch.float64, torch.float64)

    @pytest.mark.parametrize("chunk", [7, 64])
    def test_close_to_exact(self, chunk):
        sixteen, exact = self.rounded(n=64, vocab=200, d=32, e=32, spread=0.5)
        value, expected = losses.chunked_bidirectional_kl(*sixteen, 0.2, 0.7, chunk=chunk), whole(*exact, 0.2, 0.7)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=2e-3)
        hidden_grad, head_grad = gradients(value, *sixteen[:2])
        assert (hidden_grad.dtype, head_grad.dtype) == (torch.bfloat16, torch.float32)
        exact_hidden, exact_head = gradients(expected, *exact[:2])
        assert relative(hidden_grad, exact_hidden) < 0.01
        assert relative(head_grad, exact_head) < 0.01

    def test_common_offset_of_the_logits_costs_no_precision(self):
        # All logits lie near 200, where bf16 has steps of 1: rounding them there would drown the differences.
        sixteen, exact = self.rounded(n=32, vocab=100, d=16, e=16, spread=0.5)
        with torch.no_grad():
            for tensors in (sixteen, exact):
                tensors[0][:, 0] = tensors[2][:, 0] = 200
                tensors[1][:, 0] = tensors[3][:, 0] = 1
        value, expected = losses.chunked_bidirectional_kl(*sixteen, 0.2, 0.7), whole(*exact, 0.2, 0.7)
        assert value.item() == pytest.approx(expected.item(), rel=5e-3)
        assert relative(gradients(value, sixteen[0])[0], gradients(expected, exact[0])[0]) < 0.02

    def test_autocast_sets_the_products_and_nothing_else(self):
        hidden, head, teacher_hidden, teacher_head = problem(
            n=64, vocab=200, d=32, e=32, dtype=torch.float32, spread=0.5
        )
        expected = losses.chunked_bidirectional_kl(hidden, head, teacher_hidden, teacher_head, 0.2, 0.7)
        with Recorder() as plain:
            losses.chunked_bidirectional_kl(hidden, head, teacher_hidden, teacher_head, 0.2, 0.7)
        with torch.autocast("cpu", torch.bfloat16), Recorder() as autocast:
            value = losses.chunked_bidirectional_kl(hidden, head, teacher_hidden, teacher_head, 0.2, 0.7)
        assert plain.product_dtypes == {torch.float32}
        assert autocast.product_dtypes == {torch.bfloat16}
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-2)
        grads = gradients(value, hidden, head)
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert all(relative(a, b) < 0.03 for a, b in zip(grads, gradients(expected, hidden, head), strict=True))

    def test_sixteen_bit_head_gets_its_own_dtype(self):
        sixteen, exact = self.rounded(n=64, vocab=200, d=32, e=32, spread=0.5)
        head = sixteen[1].detach().bfloat16().requires_grad_()
        value = losses.chunked_bidirectional_kl(sixteen[0], head, *sixteen[2:], 0.2, 0.7, chunk=4)
        (grad,) = gradients(value, head)
        assert grad.dtype == torch.bfloat16
        assert relative(grad, gradients(whole(*exact, 0.2, 0.7), exact[1])[0]) < 0.01

    def test_compare_hidden(self):
        sixteen, exact = self.rounded(n=64, vocab=200, d=32, e=32, spread=0.5)
        labels = torch.arange(64)
        result, expected = (losses.compare_hidden(*tensors, labels) for tensors in (sixteen, exact))
        for name in ("kl", "reverse_kl", "student_nll", "teacher_nll"):
            assert result[name].dtype == torch.float32
            assert result[name].mean().item() == pytest.approx(expected[name].mean().item(), rel=2e-3), name


class TestMemory:
    N, VOCAB, CHUNK = 256, 512, 16

    def largest(self, run: Callable[[Tensors], Tensor]) -> tuple[int, int]:
        """Elements of the largest tensor that `run` and its backward make, and of the largest one kept between them."""
        args = problem(n=self.N, vocab=self.VOCAB, d=16, e=16, dtype=torch.bfloat16)
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
        with Recorder() as recorder, hooks:
            loss = run(args)
            if loss.requires_grad:
                loss.backward()
        return recorder.largest, max(saved, default=0)

    def test_whole_makes_all_logits(self):
        seen, saved = self.largest(lambda args: whole(*args, 0.2, 0.7))
        assert seen >= self.N * self.VOCAB
        assert saved >= self.N * self.VOCAB

    def test_chunked_never_does(self):
        seen, saved = self.largest(lambda args: losses.chunked_bidirectional_kl(*args, 0.2, 0.7, chunk=self.CHUNK))
        assert seen == 4 * self.CHUNK * self.VOCAB
        assert saved == 16 * self.VOCAB

    def test_compare_hidden_never_does(self):
        def run(args: Tensors) -> Tensor:
            return losses.compare_hidden(*args, torch.zeros(self.N, dtype=torch.long), chunk=self.CHUNK)["kl"]

        seen, saved = self.largest(run)
        assert seen == 4 * self.CHUNK * self.VOCAB
        assert saved == 0

    def test_work_buffers_do_not_grow_with_the_chunk(self, monkeypatch):
        monkeypatch.setattr(losses, "_BLOCK_ELEMENTS", 2 * self.VOCAB)
        seen, _ = self.largest(lambda args: losses.chunked_bidirectional_kl(*args, 0.2, 0.7, chunk=64))
        assert seen == 64 * self.VOCAB


class TestCompareHidden:
    @pytest.mark.parametrize("chunk", [1, 5, 37, 100])
    def test_equals_whole(self, monkeypatch, chunk):
        monkeypatch.setattr(losses, "_BLOCK_ELEMENTS", 3 * 50)
        args = problem()
        labels = torch.arange(37)
        labels[::5] = -100
        result = losses.compare_hidden(*args, labels, chunk=chunk)
        student, teacher = args[0] @ args[1].t(), args[2] @ args[3].t()
        expected = {
            "kl": losses.forward_kl(teacher, student),
            "reverse_kl": losses.reverse_kl(teacher, student),
            "agree": (student.argmax(-1) == teacher.argmax(-1)).double(),
            "student_nll": F.cross_entropy(student, labels, reduction="none"),
            "teacher_nll": F.cross_entropy(teacher, labels, reduction="none"),
            "valid": labels != -100,
        }
        assert result.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(result[name], values.detach(), msg=lambda text, name=name: f"{name}: {text}")
            assert not result[name].requires_grad

    def test_tokens_without_label_are_zero_and_marked(self):
        args = problem(n=3, dtype=torch.float32)
        result = losses.compare_hidden(*args, torch.tensor([4, -100, 0]))
        assert result["valid"].tolist() == [True, False, True]
        for name in ("student_nll", "teacher_nll"):
            assert result[name][1] == 0
            assert (result[name][[0, 2]] > 0).all()
        assert (result["kl"] > 0).all()

    def test_identical_models_agree(self):
        hidden, head, *_ = problem(dtype=torch.bfloat16)
        result = losses.compare_hidden(hidden, head, hidden, head, torch.zeros(37, dtype=torch.long))
        assert (result["agree"] == 1).all()
        assert (result["kl"] == 0).all()
        torch.testing.assert_close(result["student_nll"], result["teacher_nll"])


class TestDistances:
    def test_feature_alignment_by_hand(self):
        # First token: distance 5 (a 3-4-5 triangle); second: equal. Their mean is 2.5, not the squared 12.5.
        teacher = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
        student = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
        value = losses.feature_alignment(teacher, student)
        assert value.item() == pytest.approx(2.5)
        value.backward()
        # -(unit vector towards the teacher) / tokens; no gradient and no NaN where they are equal.
        torch.testing.assert_close(student.grad, torch.tensor([[-0.3, -0.4], [0.0, 0.0]]))

    def test_hidden_distance_averages_over_all_tokens(self):
        teacher = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [6.0, 8.0]]])
        assert losses.hidden_distance(teacher, torch.zeros(2, 2, 2)).item() == pytest.approx((5 + 1 + 0 + 10) / 4)

    def test_matrix_distance_by_hand(self):
        # Two heads: all four entries off by one (norm 2), and equal.
        teacher = torch.stack([torch.ones(2, 2), torch.eye(2)])[None]
        student = torch.stack([torch.zeros(2, 2), torch.eye(2)])[None].requires_grad_()
        value = losses.matrix_distance(teacher, student)
        assert value.item() == pytest.approx(1.0)
        value.backward()
        torch.testing.assert_close(student.grad, torch.stack([torch.full((2, 2), -0.25), torch.zeros(2, 2)])[None])

    def test_relative_mse_by_hand(self):
        teacher, student = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
        assert losses.relative_mse(student, teacher).item() == pytest.approx(1 / 25)
        assert losses.relative_mse(torch.zeros(1, 2), teacher).item() == pytest.approx(1)
        assert losses.relative_mse(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0

    @pytest.mark.parametrize("name", ["feature_alignment", "hidden_distance", "matrix_distance", "relative_mse"])
    def test_fp32_sums_and_no_gradient_for_the_teacher(self, name):
        teacher, student = (torch.randn(4, 6, 6).bfloat16().requires_grad_() for _ in range(2))
        value = getattr(losses, name)(teacher=teacher, student=student)
        assert value.dtype == torch.float32
        value.backward()
        assert teacher.grad is None
        assert student.grad is not None
        exact = getattr(losses, name)(teacher=teacher.double(), student=student.double())
        torch.testing.assert_close(value.double(), exact, atol=0, rtol=1e-5)
