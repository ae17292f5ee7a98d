"""A base made on the spot: two layers of random Llama, a tokenizer of bytes, a chat template; a second to make, nothing fetched."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learners import adapter
from learners.base import BaseModel, prepare

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|im_start|>", "<|im_end|>"]
    letters = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.5,
        )
    ).eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    random_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return prepare(str(folder), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture
def another() -> LlamaForCausalLM:
    """The same model again."""
    return random_llama()


@pytest.fixture
def adapted(model: LlamaForCausalLM):
    return adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)


@pytest.fixture
def written(adapted, tmp_path: Path) -> Path:
    adapter.write(adapted, tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"
