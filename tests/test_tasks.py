"""Official prompts from local files in every layout, the same items for every model, and answers worked out again."""

import gzip
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mar.config import MarConfig
from mar.model import MarForCausalLM
from mar.tasks import (
    PAPER_METRICS,
    ItemResult,
    TaskResults,
    arc_document,
    boolq_document,
    load_tasks,
    run_tasks,
    sample_items,
)

PIQA = [
    {"goal": "warm the soup", "sol1": "Use the stove.", "sol2": "Use the fridge, on its coldest setting.", "label": 0},
    {"goal": "dry a shirt", "sol1": "Put it in a bucket.", "sol2": "Hang it on a line.", "label": 1},
    {"goal": "open a jar", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
    {"goal": "light a room", "sol1": "Draw the curtains shut.", "sol2": "Press the switch.", "label": 1},
    {"goal": "cross a river", "sol1": "Take the bridge.", "sol2": "Take the ladder.", "label": 0},
]
HUB_FORM = {
    "piqa": PIQA,
    "boolq": [{"question": "is rain wet", "passage": "Rain -- Rain is water.", "idx": 7, "label": 1}],
    "winogrande": [
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    ],
    "hellaswag": [
        {
            "ind": 3,
            "activity_label": "Baking",
            "ctx_a": "A man opens the oven.",
            "ctx_b": "he",
            "endings": ["sings [title] loudly.", "takes out the bread.", "swims.", "paints it [step] red."],
            "label": "1",
        }
    ],
    "arc_easy": [
        {
            "id": "a",
            "question": "What falls from clouds?",
            "choices": {"text": ["rain", "stones", "bread"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
    ],
    "arc_challenge": [
        {
            "id": "b",
            "question": "What do plants need?",
            "choices": {"text": ["light", "coins", "paint", "noise"], "label": ["1", "2", "3", "4"]},
            "answerKey": "1",
        }
    ],
}
PROMPTS = {
    "piqa": [
        ("Question: warm the soup\nAnswer:", " Use the stove."),
        ("Question: warm the soup\nAnswer:", " Use the fridge, on its coldest setting."),
    ],
    "boolq": [
        ("Rain -- Rain is water.\nQuestion: is rain wet?\nAnswer:", " no"),
        ("Rain -- Rain is water.\nQuestion: is rain wet?\nAnswer:", " yes"),
    ],
    "winogrande": [
        ("Ann thanked Eve because Ann", " had helped."),
        ("Ann thanked Eve because Eve", " had helped."),
    ],
    "hellaswag": [
        ("Baking: A man opens the oven. He", " sings. loudly."),
        ("Baking: A man opens the oven. He", " takes out the bread."),
        ("Baking: A man opens the oven. He", " swims."),
        ("Baking: A man opens the oven. He", " paints it red."),
    ],
    "arc_easy": [
        ("Question: What falls from clouds?\nAnswer:", " rain"),
        ("Question: What falls from clouds?\nAnswer:", " stones"),
        ("Question: What falls from clouds?\nAnswer:", " bread"),
    ],
    "arc_challenge": [
        ("Question: What do plants need?\nAnswer:", " light"),
        ("Question: What do plants need?\nAnswer:", " coins"),
        ("Question: What do plants need?\nAnswer:", " paint"),
        ("Question: What do plants need?\nAnswer:", " noise"),
    ],
}
GOLD = {"piqa": 0, "boolq": 1, "winogrande": 1, "hellaswag": 1, "arc_easy": 0, "arc_challenge": 0}


def write(folder: Path, **tasks: list[dict]) -> Path:
    for task, documents in tasks.items():
        with gzip.open(folder / f"{task}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(document) + "\n" for document in documents)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bench"), **HUB_FORM)


@pytest.fixture
def mar(tiny_tokenizer: PreTrainedTokenizerFast) -> MarForCausalLM:
    torch.manual_seed(0)
    config = MarConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_heads=4,
        head_dim=8, state_size=8, chunk_size=8, initializer_range=0.2,
    )  # fmt: skip
    return MarForCausalLM(config)


@pytest.fixture
def results(folder: Path, tiny_llama: LlamaForCausalLM, mar: MarForCausalLM, tiny_tokenizer) -> TaskResults:
    models = {"teacher": (tiny_llama, tiny_tokenizer), "student": (mar.train(), tiny_tokenizer)}
    found = run_tasks(models, data_dir=folder, batch_size=3)
    assert mar.training
    return found


def test_prompts_are_the_official_ones(folder):
    loaded = load_tasks(list(PAPER_METRICS), folder)
    assert list(loaded) == list(PAPER_METRICS)
    for name, task in loaded.items():
        task.build_all_requests()
        assert [request.args for request in task.instances if request.doc_id == 0] == PROMPTS[name]
        metrics = {entry["metric"] for entry in task.config.metric_list}
        assert PAPER_METRICS[name] in metrics
        assert task.config.num_fewshot == 0


def test_answers_of_both_models(results, tiny_llama, mar, tiny_tokenizer):
    """Every log-likelihood again, from one unpadded forward of prompt and choice."""
    for name, model in (("teacher", tiny_llama), ("student", mar.eval())):
        for task, prompts in PROMPTS.items():
            item = results.items[task][name][0]
            expected = [loglikelihood(model, tiny_tokenizer, *prompt) for prompt in prompts]
            assert item.loglikelihoods == pytest.approx(expected, rel=1e-4)
            assert item.gold == GOLD[task]
            assert item.prediction == max(range(len(expected)), key=expected.__getitem__)
            assert item.acc == float(item.prediction == item.gold)
            if PAPER_METRICS[task] == "acc_norm":
                per_character = [
                    value / (len(choice) - 1) for value, (_, choice) in zip(expected, prompts, strict=True)
                ]
                assert item.prediction_norm == max(range(len(expected)), key=per_character.__getitem__)
                assert item.acc_norm == float(item.prediction_norm == item.gold)


def loglikelihood(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str) -> float:
    start, ids = len(tokenizer(prompt).input_ids), torch.tensor([tokenizer(prompt + choice).input_ids])
    with torch.no_grad():
        log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, ids[0, start:, None]).sum().item()


def test_record_and_rows(results, folder):
    assert (results.source, results.limit, results.seed, results.precision) == (str(folder), None, 0, "fp32")
    assert results.context == 512  # the smaller of the two models' limits
    assert json.loads(json.dumps(results.to_dict()))["items"]["piqa"]["student"][0]["gold"] == 0
    rows = {(row["task"], row["model"]): row for row in results.rows()}
    assert len(rows) == 12
    assert rows["piqa", "teacher"]["items"] == 5
    assert rows["boolq", "student"]["acc_norm"] is None
    assert rows["hellaswag", "student"]["acc_norm"] in (0, 1)
    right = [item.acc for item in results.items["piqa"]["teacher"]]
    assert rows["piqa", "teacher"]["acc"] == pytest.approx(sum(right) / 5)


def test_chance_and_majority_by_hand():
    """Items of 3, 4 and 5 choices: (1/3 + 1/4 + 1/5) / 3. Two of the three have their right choice in place 2."""
    items = [
        ItemResult(n, gold, [-1.0] * size, 0, None, 0.0, None)
        for n, (size, gold) in enumerate([(3, 2), (4, 0), (5, 2)])
    ]
    results = TaskResults({"arc_easy": {"one": items}}, "hub", None, 0, "fp32", 64, "0")
    assert results.chance("arc_easy") == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert results.majority("arc_easy") == pytest.approx(2 / 3)
    assert results.metrics("arc_easy") == ["acc"]


def test_items_depend_on_seed_and_task_alone(folder, tiny_llama, mar, tiny_tokenizer):
    models = {"teacher": (tiny_llama, tiny_tokenizer), "student": (mar, tiny_tokenizer)}
    both = run_tasks(models, ["boolq", "piqa"], folder, limit=3, seed=5)
    alone = run_tasks({"student": models["student"]}, ["piqa"], folder, limit=3, seed=5, batch_size=1)
    drawn = [[item.item for item in answers] for answers in both.items["piqa"].values()]
    assert drawn == [list(sample_items(5, 3, 5, "piqa"))] * 2
    again = alone.items["piqa"]["student"]
    assert [item.item for item in again] == drawn[0]
    for one, other in zip(again, both.items["piqa"]["student"], strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, rel=1e-4)  # batches pad, and must not matter
        assert one.gold == PIQA[one.item]["label"]


def test_sample_is_random_sorted_and_nested():
    assert sample_items(5, None, 0, "piqa") == range(5)
    assert sample_items(5, 5, 0, "piqa") == range(5)
    large, small = sample_items(1000, 100, 0, "piqa"), sample_items(1000, 40, 0, "piqa")
    assert list(large) == sorted(set(large))
    assert set(small) < set(large)
    assert max(large) > 900  # a sample of the whole split, not its beginning
    assert large != sample_items(1000, 100, 1, "piqa")
    assert large != sample_items(1000, 100, 0, "boolq")


def test_autocast_is_near_fp32(folder, tiny_llama, tiny_tokenizer):
    models = {"teacher": (tiny_llama, tiny_tokenizer)}
    exact, rough = (
        run_tasks(models, ["piqa"], folder, precision=name).items["piqa"]["teacher"] for name in ("fp32", "bf16")
    )
    for one, other in zip(exact, rough, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, rel=0.02)
        assert one.loglikelihoods != other.loglikelihoods


def test_a_tokenizer_keeps_its_own_special_tokens(folder, tiny_llama, tiny_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    run_tasks({"teacher": (tiny_llama, bare)}, ["boolq"], folder)
    assert bare.pad_token is None


def test_documents_as_their_authors_published_them():
    """BoolQ's own form has an answer and a title; AI2's own form of ARC keeps choices inside the question."""
    own = {"question": "is rain wet", "title": "Rain", "answer": True, "passage": "Rain is water."}
    official = HUB_FORM["boolq"][0]
    assert {key: boolq_document(own)[key] for key in ("question", "passage", "label")} == {
        key: official[key] for key in ("question", "passage", "label")
    }
    hub = HUB_FORM["arc_easy"][0]
    texts, labels = hub["choices"]["text"], hub["choices"]["label"]
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    own = {"id": "a", "question": {"stem": hub["question"], "choices": choices}, "answerKey": "A"}
    assert arc_document(own) == arc_document(hub) == hub


def test_plain_jsonl_and_integer_labels_work_too(tmp_path):
    hellaswag = {**HUB_FORM["hellaswag"][0], "label": 1}
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(hellaswag) + "\n\n", encoding="utf-8")
    write(tmp_path, winogrande=[{**HUB_FORM["winogrande"][0], "answer": 2}])
    loaded = load_tasks(["hellaswag", "winogrande"], tmp_path)
    assert loaded["hellaswag"].doc_to_target(loaded["hellaswag"].eval_docs[0]) == 1
    assert loaded["winogrande"].doc_to_text(loaded["winogrande"].eval_docs[0]) == 1


@pytest.mark.parametrize(
    ("task", "document", "message"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, r"line 1 has no field 'sol2'; task piqa needs goal, sol1"),
        ("piqa", {**PIQA[0], "label": 2}, r"the right choice is 2, not 0 to 1"),
        ("piqa", {**PIQA[0], "label": ""}, r"line 1 is no item of task piqa"),
        ("winogrande", {**HUB_FORM["winogrande"][0], "answer": ""}, r"is no item of task winogrande"),
        ("winogrande", {**HUB_FORM["winogrande"][0], "sentence": "x"}, r"the sentence has no blank _"),
        ("hellaswag", {**HUB_FORM["hellaswag"][0], "label": ""}, r"is no item of task hellaswag"),
        ("arc_easy", {**HUB_FORM["arc_easy"][0], "answerKey": "E"}, r"the right choice is 'E', not one of its labels"),
        ("boolq", ["a", "list"], r"is no item of task boolq"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(tmp_path, task, document, message):
    with pytest.raises(ValueError, match=message):
        load_tasks([task], write(tmp_path, **{task: [document]}))


def test_unusable_files_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Task piqa needs .*piqa\.jsonl\.gz \(or \.jsonl\); put it there"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl.gz").write_bytes(gzip.compress(b'{"goal": "g"}\n' * 500)[:-20])
    with pytest.raises(ValueError, match=r"piqa\.jsonl\.gz"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="is damaged"):
        load_tasks(["piqa"], tmp_path)
    write(tmp_path, piqa=[])
    with pytest.raises(ValueError, match="holds no items"):
        load_tasks(["piqa"], tmp_path)


def test_unknown_tasks_and_settings_are_one_sentence(folder, tiny_llama, tiny_tokenizer):
    models = {"teacher": (tiny_llama, tiny_tokenizer)}
    with pytest.raises(
        ValueError, match="Unknown task 'copa'; use some of piqa, boolq, winogrande, hellaswag, arc_easy"
    ):
        run_tasks(models, ["piqa", "copa"], folder)
    with pytest.raises(ValueError, match="name at least one, and each once"):
        run_tasks(models, ["piqa", "piqa"], folder)
    with pytest.raises(ValueError, match="limit is 0"):
        run_tasks(models, ["piqa"], folder, limit=0)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        run_tasks(models, ["piqa"], folder, precision="int8")
    with pytest.raises(ValueError, match="No model was given"):
        run_tasks({}, ["piqa"], folder)


def test_hub_that_cannot_be_reached_points_to_data_dir(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match=r"Could not load piqa from the Hugging Face hub .* pass --data-dir"):
        load_tasks(["piqa"])
