"""What each stage trains, on which loss: objectives on tiny models, against losses composed by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mar.config import NeuronConfig, site_neurons
from mar.conversion import calibrate_mixers, convert_llama
from mar.insertion import insert_neurons
from mar.layers import last_hidden, llama_layers, mar_layers
from mar.losses import bidirectional_kl, forward_kl, relative_mse, reverse_kl
from mar.model import MarForCausalLM
from mar.objective import Objective
from mar.optimizer import TrainConfig, build_optimizers
from mar.spikes import SpikeMonitor
from mar.stages import TRAINABLE, Align, Distill, Orient, Spike, SpikeAlign, layer_of, trained_groups
from tiny_models import llama_model, mar_model, packed_rows

BATCH = packed_rows()
NEURONS = site_neurons(NeuronConfig(time_steps=3), {"down_proj": {"time_steps": 6, "precharge": 0.5}})


def backward(loss: Tensor) -> None:
    loss.backward()


def dense_student() -> tuple[MarForCausalLM, Any]:
    teacher = llama_model(attn_implementation="eager")
    student = convert_llama(teacher)
    calibrate_mixers(student, teacher, packed_rows(seed=3))
    return student, teacher


def spiking_student() -> tuple[MarForCausalLM, MarForCausalLM]:
    dense, _ = dense_student()
    return insert_neurons(dense, NEURONS, [packed_rows(seed=3), packed_rows(seed=4)]), dense


def align() -> Objective:
    return Align(*dense_student())


def orient() -> Objective:
    return Orient(*dense_student())


def distill() -> Objective:
    return Distill(*dense_student())


def distill_reverse() -> Objective:
    return Distill(*dense_student(), alpha=0.3, beta=0.7, trained="mixers+norms")


def spike_align() -> Objective:
    return SpikeAlign(*spiking_student())


def spike(**settings: Any) -> Objective:
    return Spike(*spiking_student(), **settings)


def spike_llama(**settings: Any) -> Objective:
    dense, teacher = dense_student()
    return Spike(insert_neurons(dense, NEURONS, [BATCH]), teacher, against="llama", **settings)


STAGES: dict[str, Callable[[], Objective]] = {
    "align": align,
    "orient": orient,
    "distill": distill,
    "distill both ways": distill_reverse,
    "spike_align": spike_align,
    "spike pre": spike,
    "spike post": lambda: spike(features="post"),
    "spike both": lambda: spike(features="both", trained="all"),
    "spike none": lambda: spike(features="none", trained="thresholds"),
    "spike llama": spike_llama,
    "spike energy": lambda: spike(features="none", energy_target=0.1),
}
METRICS = {
    "align": {"relative_mse_to_llama"},
    "orient": {"matrix_distance_to_llama"},
    "distill": {"kl_to_llama"},
    "distill both ways": {"bidirectional_kl_to_llama"},
    "spike_align": {"mixer_relative_mse_to_dense", "ffn_relative_mse_to_dense"},
    "spike pre": {"bidirectional_kl_to_dense", "feature_distance_to_dense"},
    "spike post": {"bidirectional_kl_to_dense", "feature_distance_to_dense"},
    "spike both": {"bidirectional_kl_to_dense", "feature_distance_to_dense"},
    "spike none": {"bidirectional_kl_to_dense"},
    "spike llama": {"bidirectional_kl_to_llama", "feature_distance_to_llama"},
    "spike energy": {"bidirectional_kl_to_dense", "spikes_per_input"},
}
every_stage = pytest.mark.parametrize("name", STAGES)


def trained(stage: Objective) -> dict[str, nn.Parameter]:
    return {name: p for group in stage.parameter_groups() for name, p in group.parameters.items()}


@every_stage
def test_a_few_steps_lower_the_metrics(name):
    """On one batch, as gradients of the right sign must; the sum of all parts that are handed to backward falls too."""
    stage = STAGES[name]()
    groups = [{"params": list(g.parameters.values()), "lr": 3e-3 * g.lr_scale} for g in stage.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    history, losses = [], []
    for _ in range(10):
        parts: list[float] = []

        def record(loss: Tensor, parts=parts) -> None:
            parts.append(loss.item())
            loss.backward()

        optimizer.zero_grad()
        history.append(stage.accumulate(BATCH, record))
        optimizer.step()
        losses.append(sum(parts))
    for metrics in history:
        assert metrics.keys() == METRICS[name]
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert losses[-1] < losses[0]
    for metric in METRICS[name]:
        assert history[-1][metric] < history[0][metric], metric


@every_stage
def test_gradients_reach_what_is_declared_and_nothing_else(name):
    stage: Any = STAGES[name]()
    teacher_before = {key: value.clone() for key, value in stage.teacher.state_dict().items()}
    declared = trained(stage)
    stage.accumulate(BATCH, backward)
    own = dict(stage.student.named_parameters())
    assert declared.keys() <= own.keys()
    assert all(declared[key] is own[key] for key in declared)
    for key, parameter in own.items():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        # a matrix says nothing about what comes after it: gate and output projection
        expected = key in declared and not (name == "orient" and key.endswith(("z_bias", "out_proj.weight")))
        assert reached == expected, key
        assert parameter.requires_grad == (key in declared), key
        assert parameter.grad is None or key in declared, key
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())
    for key, value in stage.teacher.state_dict().items():
        assert torch.equal(value, teacher_before[key]), key


@every_stage
def test_groups_are_disjoint_and_named_apart(name):
    groups = STAGES[name]().parameter_groups()
    ids = [id(parameter) for group in groups for parameter in group.parameters.values()]
    assert len(ids) == len(set(ids))
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        for key, parameter in group.parameters.items():
            if key.endswith(".a"):
                assert (group.lr_scale, group.weight_decay, group.muon) == (5.0, 0.0, False), key
            elif parameter.dim() == 1 or key.endswith("conv_weight"):
                assert (group.lr_scale, group.weight_decay, group.muon) == (1.0, 0.0, False), key
            elif "embed_tokens" in key or "lm_head" in key:
                assert (group.lr_scale, group.weight_decay, group.muon) == (1.0, None, False), key
            else:
                assert (group.lr_scale, group.weight_decay, group.muon) == (1.0, None, True), key


@every_stage
def test_layers_that_learn_in_parallel_are_clipped_apart(name):
    for group in STAGES[name]().parameter_groups():
        tags = {layer_of(key) for key in group.parameters}
        if name in ("align", "orient", "spike_align"):
            assert tags == {group.clip}
            assert group.name.startswith(f"{group.clip}.")
        else:
            assert group.clip == "all"


def test_the_trained_sets():
    model = mar_model(neurons=NEURONS)
    names = {name for name, _ in model.named_parameters()}
    sets = {key: {name for name in names if chosen(name)} for key, chosen in TRAINABLE.items()}
    assert sets["all"] == names
    assert sets["layers"] == names - {"model.embed_tokens.weight", "lm_head.weight"}
    assert sets["thresholds"] == {name for name in names if name.endswith("neuron.a")}
    assert len(sets["thresholds"]) == 8
    inside = ("in_proj.weight", "conv_weight", "conv_bias", "z_bias", "D", "decay_bias", "out_proj.weight")
    assert sets["mixers"] == {f"model.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in inside}
    norms = {f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")}
    assert sets["mixers+norms"] - sets["mixers"] == norms | {"model.norm.weight"}
    for key, expected in sets.items():
        assert {n for group in trained_groups(model, key) for n in group.parameters} == expected
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def test_muon_and_decay_leave_the_taps_of_the_convolution_alone():
    groups = trained_groups(mar_model(), "mixers")
    optimizers = build_optimizers(groups, TrainConfig(optimizer="muon", weight_decay=0.1))
    decays = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decays |= {id(p): (type(optimizer).__name__, group["weight_decay"]) for p in group["params"]}
    for name, parameter in ((n, p) for group in groups for n, p in group.parameters.items()):
        expected = ("Muon", 0.1) if name.endswith("proj.weight") else ("AdamW", 0.0)
        assert decays[id(parameter)] == expected, name


def test_a_tied_head_is_one_embedding():
    groups = trained_groups(mar_model(tie_word_embeddings=True), "all")
    assert [list(g.parameters) for g in groups if g.name == "embeddings"] == [["model.embed_tokens.weight"]]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"trained parameter set is 'heads'; use one of 'mixers', .*'all'"):
        trained_groups(mar_model(), "heads")
    with pytest.raises(ValueError, match="features is 'mid'; use one of 'pre', 'post', 'both', 'none'"):
        Spike(*spiking_student(), features="mid")
    dense, _ = dense_student()
    with pytest.raises(ValueError, match="energy_target counts spikes, but the student has no neurons"):
        Spike(dense, dense, energy_target=1.0)


def test_orient_needs_attention_matrices():
    student, _ = dense_student()
    with pytest.raises(ValueError, match="load the teacher with attn_implementation='eager'"):
        Orient(student, llama_model()).accumulate(BATCH, backward)


# What the losses are


def gradients_of(stage: Any, loss: Tensor) -> dict[str, Tensor | None]:
    parameters = trained(stage)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


def assert_same_gradients(stage: Any, expected: dict[str, Tensor | None]) -> None:
    for name, parameter in stage.student.named_parameters():
        if (truth := expected.get(name)) is not None:
            torch.testing.assert_close(parameter.grad, truth, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_align_is_one_layer_at_a_time():
    """Per layer: relative squared error of the mixer on the teacher's own input. Gradients are that layer's alone."""
    stage: Any = align()
    expected, errors = {}, []
    for index, trace in enumerate(llama_layers(stage.teacher, BATCH)):
        block = stage.student.model.layers[index]
        mixed, _ = block.mixer(block.input_layernorm(trace.hidden), document_ids=BATCH["document_ids"])
        error = (mixed - trace.mixed).square().sum() / trace.mixed.square().sum()
        own = {name: p for name, p in trained(stage).items() if layer_of(name) == f"layer.{index}"}
        expected |= dict(zip(own, torch.autograd.grad(error, list(own.values())), strict=True))
        errors.append(error.item())
    metrics = stage.accumulate(BATCH, backward)
    assert metrics["relative_mse_to_llama"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert_same_gradients(stage, expected)


def test_orient_is_the_distance_of_matrices():
    """Mean over rows and heads of the Frobenius norm, here against matrices that attention itself returns."""
    stage: Any = orient()
    batch = packed_rows(((24,), (24,)))
    attentions = stage.teacher(batch["input_ids"], output_attentions=True).attentions
    loss = torch.zeros(())
    for block, trace, attention in zip(
        stage.student.model.layers, llama_layers(stage.teacher, batch), attentions, strict=True
    ):
        own = block.mixer.matrix(block.input_layernorm(trace.hidden))
        loss = loss + (own - attention.detach()).square().sum((-1, -2)).sqrt().mean()
    expected = gradients_of(stage, loss)
    assert stage.accumulate(batch, backward)["matrix_distance_to_llama"] == pytest.approx(loss.item() / 2, rel=1e-4)
    assert_same_gradients(stage, expected)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.2, 0.7)])
def test_distill_is_the_kl_of_next_token_distributions(alpha, beta):
    stage = Distill(*dense_student(), alpha=alpha, beta=beta)
    with torch.no_grad():
        target = stage.teacher.lm_head(last_hidden(stage.teacher, BATCH))
    logits = stage.student(**BATCH).logits
    loss = alpha * forward_kl(target, logits).mean() + beta * reverse_kl(target, logits).mean()
    expected = gradients_of(stage, loss)
    measure = "kl_to_llama" if beta == 0 else "bidirectional_kl_to_llama"
    assert stage.accumulate(BATCH, backward) == {measure: pytest.approx(loss.item(), rel=1e-4)}
    assert_same_gradients(stage, expected)


def test_spike_align_reconstructs_each_half_from_dense_inputs():
    stage: Any = spike_align()
    mixers, ffns = [], []
    for block, trace in zip(stage.student.model.layers, mar_layers(stage.teacher, BATCH), strict=True):
        mixed, _ = block.mixer(block.input_layernorm(trace.hidden), document_ids=BATCH["document_ids"])
        mixers.append(relative_mse(mixed, trace.mixed))
        ffns.append(relative_mse(block.mlp(block.post_attention_layernorm(trace.middle)), trace.ffn))
    expected = gradients_of(stage, torch.stack(mixers + ffns).sum())
    metrics = stage.accumulate(BATCH, backward)
    assert metrics["mixer_relative_mse_to_dense"] == pytest.approx(torch.stack(mixers).mean().item(), rel=1e-4)
    assert metrics["ffn_relative_mse_to_dense"] == pytest.approx(torch.stack(ffns).mean().item(), rel=1e-4)
    assert_same_gradients(stage, expected)


def normed(model: Any) -> tuple[list[Tensor], Tensor]:
    """Outputs of each layer's first norm and of the final norm; a LLaMA is walked without gradients."""
    if isinstance(model, MarForCausalLM):
        pre, hidden = [], model.model.embed_tokens(BATCH["input_ids"])
        for layer in model.model.layers:
            pre.append(layer.input_layernorm(hidden))
            hidden, _ = layer(hidden, document_ids=BATCH["document_ids"])
        return pre, model.model.norm(hidden)
    walk = zip(model.model.layers, llama_layers(model, BATCH), strict=True)
    return [layer.input_layernorm(trace.hidden) for layer, trace in walk], last_hidden(model, BATCH)


@pytest.mark.parametrize("against", ["dense", "llama"])
@pytest.mark.parametrize("features", ["pre", "post", "both", "none"])
def test_spike_is_sbds(features, against):
    """Eq. 5-7: bidirectional KL plus the unsquared distance of each model's own normed features, weights 1 to 1."""
    stage: Any = (spike if against == "dense" else spike_llama)(features=features, alpha=0.2, beta=0.7)
    pre, post = normed(stage.student)
    with torch.no_grad():
        target_pre, target_post = normed(stage.teacher)
        target = stage.teacher.lm_head(target_post)
    kl = bidirectional_kl(target, stage.student.lm_head(post), 0.2, 0.7).mean()
    between_layers = torch.stack([(t - s).norm(dim=-1).mean() for t, s in zip(target_pre, pre, strict=True)]).mean()
    at_the_end = (target_post - post).norm(dim=-1).mean()
    distance = {
        "pre": between_layers,
        "post": at_the_end,
        "both": between_layers + at_the_end,
        "none": torch.zeros(()),
    }[features]
    expected = gradients_of(stage, kl + distance)
    handed: list[float] = []

    def record(loss: Tensor) -> None:
        handed.append(loss.item())
        loss.backward()

    metrics = stage.accumulate(BATCH, record)
    assert metrics[f"bidirectional_kl_to_{against}"] == pytest.approx(kl.item(), rel=1e-4)
    assert handed == [pytest.approx((kl + distance).item(), rel=1e-4)]
    if features != "none":
        assert metrics[f"feature_distance_to_{against}"] == pytest.approx(distance.item(), rel=1e-4)
    assert_same_gradients(stage, expected)


# Energy


def spikes_per_mac(student: MarForCausalLM) -> float:
    with SpikeMonitor(student) as monitor, torch.no_grad():
        student.model(**BATCH)
    return monitor.summary().totals.spikes_per_mac


def test_the_spike_count_is_the_monitors():
    stage: Any = spike(features="none", energy_target=0.5)
    stage.parameter_groups()
    metrics = stage.accumulate(BATCH, backward)
    assert metrics["spikes_per_input"] == pytest.approx(spikes_per_mac(stage.student), rel=1e-5)


def test_the_penalty_pulls_the_spike_count_down_to_the_target():
    """From the same start with and without it."""
    counts = {}
    for target in (None, 0.6):
        stage: Any = spike(features="none", energy_target=target, energy_weight=5.0)
        before = spikes_per_mac(stage.student)
        groups = [{"params": list(g.parameters.values()), "lr": 2e-3 * g.lr_scale} for g in stage.parameter_groups()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
        for _ in range(30):
            optimizer.zero_grad()
            stage.accumulate(BATCH, backward)
            optimizer.step()
        counts[target] = spikes_per_mac(stage.student)
    assert before > 0.8
    assert counts[None] > 0.75
    assert counts[0.6] == pytest.approx(0.6, abs=0.05)


def test_no_penalty_under_the_target():
    gradients = []
    for target in (None, 100.0):
        stage: Any = spike(features="none", energy_target=target)
        stage.parameter_groups()
        stage.accumulate(BATCH, backward)
        gradients.append({name: p.grad for name, p in stage.student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_other_neurons_are_counted_as_they_fire(kind):
    dense, _ = dense_student()
    student = insert_neurons(dense, site_neurons(NeuronConfig(kind=kind)), [BATCH])
    stage = Spike(student, dense, features="none", energy_target=0.1)
    metrics = stage.accumulate(BATCH, backward)
    assert metrics["spikes_per_input"] == pytest.approx(spikes_per_mac(student), rel=1e-5)


# In use


def test_stages_run_under_autocast():
    for name, build in STAGES.items():
        stage = build()
        stage.parameter_groups()
        parts: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16):
            metrics = stage.accumulate(BATCH, lambda loss, parts=parts: parts.append(loss.detach()))
        assert metrics.keys() == METRICS[name]
        assert all(part.dtype == torch.float32 and part.isfinite() for part in parts), name


def test_a_teacher_in_16_bits_serves_a_student_in_32():
    student, teacher = dense_student()
    for stage in (Align(student, teacher.bfloat16()), Distill(student, teacher)):
        with torch.autocast("cpu", torch.bfloat16):
            metrics = stage.accumulate(BATCH, lambda _: None)
        assert all(map(math.isfinite, metrics.values()))
