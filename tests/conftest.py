"""What all tests share: shape and type checks on every call into mar, fixed seeds, no network, and a tiny LLaMA."""
# ruff: noqa: E402 - variables and the import hook come before the libraries that they are for

import os
import random
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from beartype.roar import BeartypeDecorHintException
from jaxtyping import install_import_hook


def checked(function: Callable) -> Callable:
    """beartype for functions, with int standing in for float.

    Left alone are data classes, which check their own values (tests hand them wrong ones), and functions with hints
    that cannot be checked on one function by itself: Self, or a Protocol without isinstance.
    """
    if function.__qualname__.endswith("__init__"):
        return function
    try:
        return beartype(function, conf=BeartypeConf(is_pep484_tower=True))
    except BeartypeDecorHintException:
        return function


import mar.config  # noqa: F401 - before the hook, whose data classes refuse the extra keys of a saved MarConfig

install_import_hook("mar", f"{__name__}.checked")
# beartype looks at list items at random; drawing from the shared generator it would change what training draws
codemain.getrandbits = random.Random(0).getrandbits

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and test processes share the cores

VOCABULARY = 320
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "The river rose during the night and the children watched it from the bridge.",
    "A good recipe names every ingredient, every amount and every step.",
    "Please explain how the engine turns heat into motion, and why it needs water.",
    "They walked through the town, past the station and the old market, to the harbour.",
    "The table lists the numbers of the first ten years: 10, 12, 15, 18 and 21.",
    "What is the answer to the question that nobody asked her?",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch allocates without filling holds NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    assert torch.ones(1).new_empty(4).isnan().all()
    assert torch.empty_like(torch.ones(4)).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """Keep tests out of the user's cache, in processes that they start too."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAR_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template and 320 entries; <|im_end|> (id 2) is EOS and padding, there is no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    names = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def tiny_llama_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved LLaMA with random weights and its tokenizer: 2 layers, hidden 32, 4 heads, 2 KV heads, untied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # large enough that attention is not uniform and the next-token distribution not flat
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llama(tiny_llama_folder: Path) -> LlamaForCausalLM:
    """The model of `tiny_llama_folder`, in fp32 and eval mode; each test gets its own."""
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
