import json
import math
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mar.checkpoint
import tiny_training
from mar.checkpoint import DiskFull, alone_in, load_checkpoint
from mar.objective import ParameterGroup
from mar.train import TrainConfig, TrainingDiverged, train
from tiny_training import (
    FORKS,
    LENGTH,
    CountingRows,
    NextWord,
    Stopped,
    in_two_processes,
    log_of,
    run,
    run_as_one_of_several,
    run_until_killed,
    signal_at,
    stop_at,
)

Backward = Callable[[Tensor], None]
STEPS = 12


def parameters_in(folder: Path) -> dict[str, bytes]:
    found = load_checkpoint(folder / "checkpoints")
    assert found is not None
    return {name: tensor.numpy().tobytes() for name, tensor in found.tensors["parameters"].items()}


def checkpoints_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted and that saved only at its end."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, checkpoint_minutes=5)
    return folder


def assert_same_run(folder: Path, other: Path, steps: int = STEPS) -> None:
    assert log_of(folder) == log_of(other)
    assert len(log_of(folder)) == steps
    assert parameters_in(folder) == parameters_in(other)


def test_the_loss_falls(tmp_path: Path) -> None:
    metrics = run(tmp_path, tokens=60 * 4 * LENGTH, lr=3e-2, checkpoint_minutes=5)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert len(losses) == metrics["steps"] == 60
    assert losses[0] == pytest.approx(math.log(16), abs=0.5)
    assert metrics["loss"] == pytest.approx(sum(losses[-6:]) / 6)
    assert metrics["loss"] < 0.5 * losses[0]


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"schedule": "wsd"}, {"precision": "bf16"}])
def test_other_ways_to_train_also_learn_and_resume(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(tmp_path / "whole", **changes)
    for call in (4, 9):
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", NextWord(before=stop_at(call)), **changes)
    run(tmp_path / "stopped", **changes)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    losses = [line["loss"] for line in log_of(tmp_path / "whole")]
    assert losses[-1] < 0.9 * losses[0]


def test_forward_runs_in_bf16_and_backward_without_autocast(tmp_path: Path) -> None:
    seen = []

    class Look(NextWord):
        def accumulate(self, batch: dict[str, Tensor], backward: Backward) -> dict[str, float]:
            product = self.model["out"](torch.ones(1, 32))
            product.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            seen.append(product.dtype)
            backward(product.float().sum())
            return {}

    metrics = run(tmp_path, Look(), tokens=1, accumulation=1, precision="bf16")
    assert seen == [torch.bfloat16, False]
    assert metrics["precision"] == "bf16"


@pytest.mark.parametrize(("faster", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_auto_trains_in_what_is_faster_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("mar.precision.faster_precision", lambda _: faster)
    seen = []

    class Look(NextWord):
        def accumulate(self, batch: dict[str, Tensor], backward: Backward) -> dict[str, float]:
            product = self.model["out"](torch.ones(1, 32))
            seen.append(product.dtype)
            backward(product.float().sum())
            return {}

    assert run(tmp_path, Look(), tokens=1, accumulation=1, precision="auto")["precision"] == faster
    assert seen == [dtype]


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    run(tmp_path / "whole", NextWord(noise=False), batch_size=4, accumulation=1)
    run(tmp_path / "parts", NextWord(noise=False), batch_size=2, accumulation=2)
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["right"] == pytest.approx(other["right"])
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


class Slopes:
    """Two scalars with the gradients 3 and 4, whatever the data; the loss comes in two parts."""

    name = "slopes"

    def __init__(self, tags: tuple[str, str] = ("all", "all")) -> None:
        self.tags = tags
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("first", {"a": self.a}, clip=self.tags[0]),
            ParameterGroup("second", {"b": self.b}, clip=self.tags[1], lr_scale=5.0),
        ]

    def accumulate(self, batch: dict[str, Tensor], backward: Backward) -> dict[str, float]:
        backward(3 * self.a)
        backward(4 * self.b)
        return {}


@pytest.mark.parametrize(
    ("tags", "clip", "gradients", "norms"),
    [
        (("all", "all"), 1.0, (0.6, 0.8), None),
        (("one", "two"), 1.0, (1.0, 1.0), {"one": 3.0, "two": 4.0}),
        (("one", "two"), 3.5, (3.0, 3.5), {"one": 3.0, "two": 4.0}),
        (("all", "all"), None, (3.0, 4.0), None),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_groups_are_clipped_by_tag(
    tmp_path: Path, tags: tuple[str, str], clip: float | None, gradients: Any, norms: Any, accumulation: int
) -> None:
    objective = Slopes(tags)
    config = TrainConfig(tokens=1, batch_size=1, accumulation=accumulation, lr=0.01, warmup_steps=0, clip=clip)
    seen: list[Any] = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: seen.append([nn.utils.get_total_norm([p.grad]).item() for p in (objective.a, objective.b)])
    )
    try:
        train(objective, CountingRows(), config, tmp_path, progress=False)
    finally:
        hook.remove()
    assert seen == [pytest.approx(gradients, rel=1e-5)]
    (line,) = log_of(tmp_path)
    assert (line["loss"], line["grad_norm"], line.get("grad_norms")) == (7.0, 5.0, norms)
    # Adam's first update has the size of the learning rate, here 0.01 and five times that.
    assert [1 - objective.a.item(), 1 - objective.b.item()] == pytest.approx([0.01, 0.05], rel=1e-4)


def test_interrupted_before_every_step(tmp_path: Path, whole: Path) -> None:
    for _ in range(STEPS - 1):
        with pytest.raises(Stopped):
            run(tmp_path, NextWord(before=stop_at(4)))
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_killed_twice(tmp_path: Path, whole: Path) -> None:
    for call in (8, 9):
        process = FORKS.Process(target=run_until_killed, args=(tmp_path, call))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert checkpoints_in(tmp_path) == [6, 7]
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="Stopped after step 5 of 12"):
        run(tmp_path, NextWord(before=signal_at(9, signal.SIGINT)), checkpoint_minutes=5)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Finishing this step" in capfd.readouterr().err
    assert checkpoints_in(tmp_path) == [5]
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_ctrl_c_in_the_last_step_is_not_swallowed(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, NextWord(before=signal_at(2 * STEPS, signal.SIGINT)))
    run(tmp_path, NextWord(before=stop_at(1)))
    assert_same_run(tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, NextWord(before=signal_at(9, signal.SIGINT, times=2)))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints_in(tmp_path) == [3, 4]


def test_training_in_a_thread(tmp_path: Path, whole: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert_same_run(tmp_path, whole)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    in_two_processes(run_as_one_of_several, tmp_path / "two")
    run(tmp_path / "one", NextWord(noise=False), batch_size=4, accumulation=1)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["right"] for line in two] == pytest.approx([line["right"] for line in one])
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    with pytest.raises(ValueError, match="processes was 2 and is now 1"):
        run(tmp_path / "two", NextWord(noise=False), accumulation=1)


class Poisoned(NextWord):
    """Gives something that is not finite at micro step 7, in step 4."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.model["out"].weight.register_hook(lambda slope: slope * math.inf if self.now("gradient") else slope)

    def now(self, where: str) -> bool:
        return self.where == where and self.calls == 7

    def accumulate(self, batch: dict[str, Tensor], backward: Backward) -> dict[str, float]:
        metrics = super().accumulate(batch, lambda loss: backward(loss * math.nan if self.now("loss") else loss))
        return {"right": math.inf} if self.now("metric") else metrics


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("loss", r"loss is nan and the gradient norm of parameter group 'body' is nan and"),
        ("metric", r"right is inf; start"),
        ("gradient", r": the gradient norm of parameter group 'head' is (inf|nan); start"),
    ],
)
def test_divergence_names_the_place_and_spares_the_checkpoint(tmp_path: Path, where: str, named: str) -> None:
    with pytest.raises(TrainingDiverged, match=named) as caught:
        run(tmp_path, Poisoned(where))
    sentence = str(caught.value)
    assert sentence.startswith("Stage 'next-word' diverged at step 4: ")
    assert "lower lr (now 0.01) or with precision 'fp32'" in sentence
    assert sentence.endswith(f"(the last good checkpoint is {tmp_path / 'checkpoints' / 'step-000000003'}).")
    assert checkpoints_in(tmp_path) == [2, 3]
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert all(tensor.isfinite().all() for tensors in found.tensors.values() for tensor in tensors.values())


def test_parameters_that_are_nan_from_the_start(tmp_path: Path) -> None:
    student = NextWord()
    with torch.no_grad():
        student.model["hidden"].weight[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"at step 1: loss is nan .* \(no checkpoint had been written\)"):
        run(tmp_path, student)


def test_a_full_disk_loses_nothing(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill(calls: int) -> None:
        if calls == 9:
            monkeypatch.setattr(mar.checkpoint, "save_file", full)

    with pytest.raises(DiskFull, match="The disk is full"):
        run(tmp_path, NextWord(before=fill))
    monkeypatch.undo()
    assert checkpoints_in(tmp_path) == [3, 4]
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_truncated_checkpoint_falls_back(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, NextWord(before=stop_at(9)))
    damaged = tmp_path / "checkpoints" / "step-000000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"step-000000004 is damaged \(optimizer.safetensors"):
        run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_run_at_its_constant_rate_takes_more_tokens(tmp_path: Path) -> None:
    stable = {"schedule": "wsd", "decay_fraction": 0.25}
    longer = stable | {"tokens": 16 * 4 * LENGTH, "decay_fraction": 0.5}
    run(tmp_path / "whole", **longer)
    with pytest.raises(Stopped):
        run(tmp_path / "run", NextWord(before=stop_at(9)), **stable)
    run(tmp_path / "run", **longer)
    assert_same_run(tmp_path / "run", tmp_path / "whole", steps=16)


def test_a_run_whose_rate_has_fallen_takes_no_more_tokens(tmp_path: Path) -> None:
    falling = {"schedule": "wsd", "decay_fraction": 0.5}
    with pytest.raises(Stopped):
        run(tmp_path, NextWord(before=stop_at(17)), **falling)
    with pytest.raises(ValueError, match="of another run: tokens was 384 and is now 512"):
        run(tmp_path, **falling | {"tokens": 16 * 4 * LENGTH})


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path),
        ProcessPoolExecutor(1, FORKS) as other,
        pytest.raises(ValueError, match=f"Another process is at work in {tmp_path}; wait for it, or use another"),
    ):
        other.submit(run, tmp_path).result()
    run(tmp_path)


def test_another_run_is_refused_by_field(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, NextWord(before=stop_at(7)))
    with pytest.raises(
        ValueError, match=r"of another run: lr was 0.01 and is now 0.02, betas was \[0.9, 0.95\] and is"
    ):
        run(tmp_path, lr=0.02, betas=(0.8, 0.95))
    wider = NextWord()
    wider.model["out"] = nn.Linear(32, 20)
    with pytest.raises(ValueError, match=r"shape of head/out.weight was \[16, 32\] and is now \[20, 32\], shape of"):
        run(tmp_path, wider)
    config = TrainConfig(**tiny_training.CONFIG)
    with pytest.raises(ValueError, match=r"recipe.alpha was absent and is now 0.2; set these back"):
        train(NextWord(), CountingRows(), config, tmp_path, progress=False, recipe={"alpha": 0.2})
    assert checkpoints_in(tmp_path) == [2, 3]
    run(tmp_path, checkpoint_minutes=7, keep_checkpoints=1, log_every=3)


def test_a_finished_run_is_not_repeated(tmp_path: Path, whole: Path) -> None:
    metrics = run(tmp_path)
    student = NextWord(before=stop_at(1))
    assert run(tmp_path, student) == metrics == json.loads((tmp_path / "done.json").read_text())
    assert metrics["tokens"] == STEPS * 4 * LENGTH
    restored = {f"{g.name}/{n}": p for g in student.parameter_groups() for n, p in g.parameters.items()}
    assert {name: p.detach().numpy().tobytes() for name, p in restored.items()} == parameters_in(whole)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.tensors["optimizer"] == {}
    assert checkpoints_in(tmp_path) == [STEPS]


def test_gradients_do_not_stay(tmp_path: Path) -> None:
    student = NextWord()
    run(tmp_path, student)
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_too_little_data_is_a_sentence(tmp_path: Path) -> None:
    config = TrainConfig(**tiny_training.CONFIG)
    with pytest.raises(ValueError, match="The data hold fewer than 2 rows of 8 tokens; add text"):
        train(NextWord(), CountingRows(total=1), config, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([], "Stage 'next-word' names no parameter to train"),
        ([("a", torch.float32, True), ("a", torch.float32, True)], "has two parameters called a/w"),
        ([("a", torch.bfloat16, True)], "Parameter a/w of stage 'next-word' is torch.bfloat16"),
        ([("a", torch.float32, False)], "a/w of stage 'next-word' is torch.float32 with requires_grad False"),
        ([("a", torch.float32, True)], "Stage 'next-word' gave no parameter a gradient"),
    ],
)
def test_what_cannot_train_is_refused(tmp_path: Path, groups: Any, sentence: str) -> None:
    class Odd(NextWord):
        def parameter_groups(self) -> list[ParameterGroup]:
            return [
                ParameterGroup(name, {"w": nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=trains)})
                for name, dtype, trains in groups
            ]

    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, Odd())
