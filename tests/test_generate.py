"""Sampling, streaming, chat and text writing, on tiny random models."""

import copy
import json
import math
import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mar.config import NeuronConfig, site_neurons
from mar.generate import Draft, Session, TokenStream, prompt_ids, sample, stop_ids, stream, write_text
from mar.kernels.paged import PAGE, Pages, read_prompt
from tiny_models import llama_model, mar_model

VOCAB = 320
"""That of the tiny tokenizer: more than one block of the two-level draw, and no multiple of it."""

END = 2
FP32 = torch.float32


def llama() -> LlamaForCausalLM:
    return llama_model(vocab_size=VOCAB, eos_token_id=END, pad_token_id=0)


@pytest.fixture(params=["llama", "mar", "spiking"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "llama":
        return llama()
    neurons = site_neurons(NeuronConfig(time_steps=8, precharge=0.5)) if request.param == "spiking" else None
    return mar_model(vocab_size=VOCAB, eos_token_id=END, pad_token_id=0, neurons=neurons)


@pytest.fixture
def bare_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    return bare


def some_ids(length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its degrees of freedom; about 1 for draws from `probabilities`."""
    expected = probabilities * counts.sum()
    kept = expected > 5
    rest = torch.stack([counts[~kept].sum(), expected[~kept].sum()])
    parts = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(5)
    return float(parts / kept.sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    probabilities = (logits.double() / temperature).softmax(-1)
    drawn = sample(logits.expand(40_000, -1), temperature, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=VOCAB)
    # The statistic's standard deviation at about 200 degrees of freedom is 0.1.
    assert abs(chi_square(counts, probabilities) - 1) < 0.4
    assert chi_square(counts, probabilities.roll(1)) > 10


def test_bfloat16_logits_are_sampled_in_fp32() -> None:
    """2,048 equal logits: bf16 probabilities summed in bf16 would stop growing at 256 of them."""
    drawn = sample(
        torch.zeros(8_000, 2048, dtype=torch.bfloat16).expand(8_000, -1), generator=torch.Generator().manual_seed(0)
    )
    assert abs(float(drawn.double().mean()) - 1023.5) < 4 * 2048 / math.sqrt(12 * 8_000)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((2_000, VOCAB), -torch.inf)
    logits[:, [0, 255, 256, VOCAB - 1]] = torch.tensor([0.0, -1.0, -1.0, 0.0])
    assert sample(logits, generator=torch.Generator().manual_seed(0)).unique().tolist() == [0, 255, 256, VOCAB - 1]
    logits[:, 1:] = -torch.inf
    assert sample(logits).unique().tolist() == [0]


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.4, 0.15, 0.35]).log().expand(500, -1)
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, top_k=2, generator=generator).unique().tolist() == [1, 3]
    assert sample(logits, top_p=0.8, generator=generator).unique().tolist() == [1, 2, 3]
    assert sample(logits, top_p=0.39, generator=generator).unique().tolist() == [1]
    # top_k first: of the two that are left, the likelier one holds 0.4 / 0.75 of the probability.
    assert sample(logits, top_k=2, top_p=0.5, generator=generator).unique().tolist() == [1]
    assert sample(logits, top_k=9, generator=generator).unique().tolist() == [0, 1, 2, 3]


def test_cold_samples_become_the_likeliest_token() -> None:
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-6, 1e-42):
        assert torch.equal(sample(logits, temperature), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(temperature: float, value: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        sample(logits, temperature)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "0 tokens"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "one row"),
        ({"input_ids": torch.tensor([[3, VOCAB]])}, f"Token id {VOCAB}"),
        ({"input_ids": torch.tensor([[-1]])}, "Token id -1"),
    ],
)
def test_stream_refuses_at_once(settings: dict, words: str) -> None:
    """At the call, not at the first token."""
    with pytest.raises(ValueError, match=words):
        stream(llama(), **{"input_ids": some_ids(), "max_new_tokens": 3} | settings)


def test_greedy_stream_equals_generate(model: PreTrainedModel) -> None:
    ids = some_ids()
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(expected) == 40 or expected[-1] == END
    assert list(stream(model, ids, 40, temperature=0)) == expected


def test_stream_ends_after_the_stop_token(model: PreTrainedModel) -> None:
    free = list(stream(model, some_ids(), 30, temperature=0, stop=()))
    assert len(free) == 30
    cut = free.index(free[10]) + 1
    assert list(stream(model, some_ids(), 30, temperature=0, stop=[free[10]])) == free[:cut]


def test_no_new_tokens(model: PreTrainedModel) -> None:
    assert list(stream(model, some_ids(), 0)) == []


def test_stop_ids_come_from_the_generation_config() -> None:
    model = llama()
    assert stop_ids(model) == {END}
    model.generation_config.eos_token_id = [7, 8]
    assert stop_ids(model) == {7, 8}
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert stop_ids(model) == set()


def test_a_seed_decides_the_stream(model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    first, again, other, unseeded, fresh = (
        list(stream(model, some_ids(), 12, stop=(), seed=seed)) for seed in (0, 0, 1, None, None)
    )
    assert first == again
    assert first != other
    assert unseeded != fresh
    assert torch.equal(torch.get_rng_state(), before)


def test_two_turns_equal_one_pass(model: PreTrainedModel) -> None:
    state = TokenStream(model)
    question, answer, question_2 = some_ids(9), [], some_ids(2, seed=6)
    answer = list(stream(model, question, 6, temperature=0, stop=(), state=state))
    answer_2 = list(stream(model, question_2, 6, temperature=0, stop=(), state=state))
    whole = torch.cat([question, torch.tensor([answer]), question_2], 1)
    assert list(stream(model, whole, 6, temperature=0, stop=())) == answer_2
    assert list(stream(model, question_2, 6, temperature=0, stop=())) != answer_2, "the second turn forgot the first"


def test_a_stream_left_early_goes_on(model: PreTrainedModel) -> None:
    whole = list(stream(model, some_ids(), 12, temperature=0, stop=()))
    state = TokenStream(model)
    reply = stream(model, some_ids(), 12, temperature=0, stop=(), state=state)
    start = [next(reply) for _ in range(7)]
    assert start + list(state.generate(5, temperature=0, stop=())) == whole


def test_seed_belongs_to_the_state() -> None:
    model = llama()
    with pytest.raises(ValueError, match="give the seed to its TokenStream"):
        stream(model, some_ids(), 3, seed=0, state=TokenStream(model))


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    whole = list(stream(model, some_ids(40), 8, temperature=0, stop=()))
    monkeypatch.setattr("mar.generate.READ_TOKENS", 7)
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    assert list(stream(model, some_ids(40), 8, temperature=0, stop=())) == whole
    assert max(lengths) == 7


def test_mar_streams_in_constant_memory() -> None:
    model = mar_model(vocab_size=VOCAB)
    state = TokenStream(model, seed=0)

    def numbers() -> int:
        layers = state.cache.layers
        states = (part for layer in layers for part in (*layer.conv_states.values(), *layer.recurrent_states.values()))  # type: ignore[union-attr]
        return sum(part.numel() for part in states)

    sizes = [numbers() for _ in stream(model, some_ids(), 20, stop=(), state=state)]
    assert len(set(sizes)) == 1


def test_prompts_become_a_users_turn(
    tiny_tokenizer: PreTrainedTokenizerFast, bare_tokenizer: PreTrainedTokenizerFast
) -> None:
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, "hi")[0]) == turn
    assert bare_tokenizer.decode(prompt_ids(bare_tokenizer, "hi")[0]) == "hi"


class Script:
    """A token stream that says what it is given; `sequence` is all that was fed and said."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)
        self.sequence: list[int] = []

    def feed(self, ids: list[int]) -> None:
        self.sequence += ids

    def generate(self, *_: object) -> Iterator[int]:
        for token in self.answers.pop(0):
            self.sequence.append(token)
            yield token


@pytest.mark.parametrize("ended", [True, False])
def test_a_session_continues_as_the_template_renders(tiny_tokenizer: PreTrainedTokenizerFast, ended: bool) -> None:
    """Whether the model wrote the end of its turn or was cut before."""
    session = Session(llama(), tiny_tokenizer)
    answer = [*tiny_tokenizer("yes").input_ids, *[END] * ended]
    session.tokens = script = Script(answer, answer)  # type: ignore[assignment]
    assert "".join(session.reply("first?")) == "yes"
    assert "".join(session.reply("second?")) == "yes"
    turns = [
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "second?"},
    ]
    rendered = tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tiny_tokenizer.decode(script.sequence) == str(rendered) + tiny_tokenizer.decode(answer)


def test_a_session_without_template_continues_the_text(bare_tokenizer: PreTrainedTokenizerFast) -> None:
    session = Session(llama(), bare_tokenizer)
    session.tokens = script = Script(bare_tokenizer("b").input_ids, [])  # type: ignore[assignment]
    assert [*session.reply("a"), *session.reply("c")] == ["b", "", ""]
    assert bare_tokenizer.decode(script.sequence) == "abc"


def test_characters_of_several_bytes_are_shown_whole(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    session = Session(llama(), tiny_tokenizer)
    session.tokens = Script(tiny_tokenizer("aé→b").input_ids)  # type: ignore[assignment]
    assert [piece for piece in session.reply("?") if piece] == ["a", "é", "→", "b"]


def test_a_session_keeps_its_state(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its greedy turns equal a stream over the ids of the whole conversation."""
    session = Session(model, tiny_tokenizer, temperature=0)
    said = ["".join(session.reply(text, max_new_tokens=5)) for text in ("hello", "and then?")]
    ids = prompt_ids(tiny_tokenizer, "hello")
    first = list(stream(model, ids, 5, temperature=0))
    closing = "" if first[-1] == END else "<|im_end|>"
    turn = tiny_tokenizer(f"{closing}\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n").input_ids
    second = list(stream(model, torch.cat([ids, torch.tensor([first + turn])], 1), 5, temperature=0))
    assert said == [tiny_tokenizer.decode(part, skip_special_tokens=True) for part in (first, second)]


def test_pages_equal_the_models_own_attention() -> None:
    """Three documents of different lengths, one replaced midway by another: logits as from a plain forward pass."""
    model = llama_model(vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(0)
    pages = Pages(model, slots=3, length=PAGE + 40)
    texts = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (PAGE, PAGE + 20, 5)]
    with torch.no_grad():
        for slot, text in enumerate(texts):
            prompt = read_prompt(model, text)
            assert torch.allclose(prompt.logits, model(text[None]).logits[:, -1], atol=1e-5)
            pages.admit(slot, prompt)
        for step in range(14):
            if step == 8:
                texts[0] = torch.randint(3, VOCAB, (3,), generator=generator)
                pages.admit(0, read_prompt(model, texts[0]))
            new = torch.randint(3, VOCAB, (3,), generator=generator)
            texts = [torch.cat([text, token[None]]) for text, token in zip(texts, new, strict=True)]
            logits = pages.step(new.tolist())
            for slot, text in enumerate(texts):
                assert torch.allclose(logits[slot], model(text[None]).logits[0, -1], atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


PROMPTS = ["hi", "tell me a story", "x"]


def test_written_text_is_greedy_generation_at_temperature_zero(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    length = PAGE + 20
    documents = write_text(model, tiny_tokenizer, PROMPTS, 3 * length, length, 3, temperature=0, dtype=FP32)
    for document, prompt in zip(documents, PROMPTS, strict=False):
        ids = prompt_ids(tiny_tokenizer, prompt)
        expected = model.generate(ids, max_length=length, do_sample=False)[0]
        assert ids.shape[1] < len(document)
        assert document.tolist() == expected[: len(document)].tolist()


def test_documents_hold_prompt_text_and_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    length, tokens, slots = 60, 1_500, 8
    model = llama()
    ends = model.generation_config.eos_token_id = list(range(2, 12))
    documents = write_text(model, tiny_tokenizer, PROMPTS, tokens, length, slots, seed=3)
    assert tokens <= sum(map(len, documents)) < tokens + length
    kinds = {"ended": 0, "full": 0, "cut": 0}
    for number, document in enumerate(documents):
        prompt = prompt_ids(tiny_tokenizer, PROMPTS[number % 3])[0]
        written = document[len(prompt) :].tolist()
        assert document.dtype == torch.long
        assert torch.equal(document[: len(prompt)], prompt)
        assert written
        assert len(document) <= length
        assert not set(ends) & set(written[:-1])
        kinds["ended" if written[-1] in ends else "full" if len(document) == length else "cut"] += 1
    assert kinds["ended"] > 3
    assert kinds["full"] > 3
    assert kinds["cut"] <= slots, "a document was cut that was not open at the end"


def test_written_text_depends_on_the_seed_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    first, again, other = (
        [document.tolist() for document in write_text(model, tiny_tokenizer, PROMPTS, 300, 50, 4, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def steps_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, last: int | None) -> list[int]:
    """Of each later step of the model its number; Ctrl-C is pressed within the `last`."""
    step, seen = Pages.step, []

    def counted(pages: Pages, tokens: list[int]) -> Tensor:
        seen.append(len(seen) + 1)
        if seen[-1] == last:
            os.kill(os.getpid(), signal.SIGINT)
        return step(pages, tokens)

    monkeypatch.setattr(Pages, "step", counted)
    return seen


def test_an_interrupted_text_goes_on_where_it_was(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, over documents that end and whose pages others take over, to the same words in no more steps."""
    model = llama()
    model.generation_config.eos_token_id = list(range(2, 8))

    def write(draft: Draft | None, last: int | None = None) -> tuple[list[list[int]], int]:
        with monkeypatch.context() as patch:
            seen = steps_until_ctrl_c(patch, last)
            documents = write_text(model, tiny_tokenizer, PROMPTS, 1_500, PAGE + 30, 4, seed=3, draft=draft)
            return [document.tolist() for document in documents], len(seen)

    expected, steps = write(None)
    draft = Draft(tmp_path / "draft", {"seed": 3})
    for last in (steps // 3, steps // 2):
        with pytest.raises(KeyboardInterrupt, match=r"^Stopped after \S+ of 1,500 tokens; run again to go on"):
            write(draft, last)
    assert write(draft) == (expected, steps - steps // 3 - steps // 2)
    assert write(Draft(draft.folder, {"seed": 4})) == (expected, steps), "the draft of another text was taken"
    at_last = Draft(tmp_path / "last", {"seed": 3})
    with pytest.raises(KeyboardInterrupt):
        write(at_last, steps)
    assert write(at_last) == (expected, 0)


def test_the_written_with_model_stays_as_it_is(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    in_bf16 = write_text(model, tiny_tokenizer, PROMPTS, 300, 60, temperature=0)
    assert {value.dtype for value in model.state_dict().values()} == {FP32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.to(torch.bfloat16)
    of_bf16 = write_text(model, tiny_tokenizer, PROMPTS, 300, 60, temperature=0)
    assert [document.tolist() for document in in_bf16] == [document.tolist() for document in of_bf16]
    assert model.model.rotary_emb.inv_freq.dtype == FP32


def test_written_text_follows_the_models_distribution(bare_tokenizer: PreTrainedTokenizerFast) -> None:
    """First and second tokens after one prompt, against probabilities from plain forward passes."""
    model = llama()
    prompt = prompt_ids(bare_tokenizer, "ab")
    start = prompt.shape[1]
    documents = write_text(model, bare_tokenizer, ["ab"], 4_000 * (start + 2), start + 2, 2_000, dtype=FP32)
    with torch.no_grad():
        p_first = model(prompt).logits[0, -1].double().softmax(-1)
        every = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        p_next = model(every).logits[:, -1].double().softmax(-1)
    first = torch.tensor([int(document[start]) for document in documents])
    assert abs(chi_square(torch.bincount(first, minlength=VOCAB), p_first) - 1) < 0.5
    second = torch.tensor([int(document[start + 1]) for document in documents if len(document) == start + 2])
    p_first[END] = 0
    p_second = p_first @ p_next / p_first.sum()
    assert abs(chi_square(torch.bincount(second, minlength=VOCAB), p_second) - 1) < 0.5


def test_written_text_shows_its_progress(
    tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(llama(), tiny_tokenizer, PROMPTS, 200, 50, 4)
    assert capsys.readouterr() == ("", "")
    write_text(llama(), tiny_tokenizer, PROMPTS, 200, 50, 4, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "200 of 200 tokens" in shown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "number of prompts"),
        ({"prompts": [""]}, "has 0 tokens"),
        ({"prompts": ["a very long prompt that leaves no room"]}, "length = 20"),
        ({"tokens": 0}, "The tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"model": mar_model(vocab_size=VOCAB)}, "needs a LLaMA model"),
    ],
)
def test_write_text_refuses(bare_tokenizer: PreTrainedTokenizerFast, changes: dict, words: str) -> None:
    settings = {"model": llama(), "tokenizer": bare_tokenizer, "prompts": ["a"], "tokens": 40, "length": 20} | changes
    with pytest.raises(ValueError, match=words):
        write_text(**settings)


def test_the_benchmark_counts_what_was_written(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    main = runpy.run_path(str(folder / "write_text.py"))["main"]
    main(["--json", "--teacher", str(tiny_llama_folder), "--length", "150", "--batch", "2", "--threads", "1"])
    found = json.loads(capsys.readouterr().out)["batches"]["2"]
    assert found["plain"]["documents"] == 2
    for peer in (found["ours"], found["plain"]):
        assert 0 < peer["written_tokens"] < peer["tokens"] <= 3 * 150
        assert peer["tokens_per_second"] == pytest.approx(peer["tokens"] / peer["seconds"])
    parts = found["step_milliseconds"]
    assert 0 < parts["attention"] < parts["model"]


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    assert sample(torch.tensor([[1.0, 3.0, 2.0, -50.0]]), temperature).tolist() == [1]


def test_a_prompt_that_is_no_unicode_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, bare_tokenizer: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (tiny_tokenizer, bare_tokenizer):
        with pytest.raises(ValueError, match=r"the text holds '\\udcff' near"):
            prompt_ids(tokenizer, "caf\udcff")
