"""Encoding, scoring and artifacts on a two-layer random Llama made on the spot."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners import adapter, artifact
from learners.base import BaseMissing, BaseModel, prepare
from learners.encode import IGNORED, Encoded, collate, encode, token_losses
from learners.evaluate import logprobs, score

BASE = BaseModel(None, "tiny", "w", "t", "c")
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)


class Letters:
    """A tokenizer of letters with a chat template, enough for `encode`."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def ask(text):
    return [{"role": "user", "content": text}]


def test_the_loss_is_on_the_reply_and_its_end():
    encoded = encode(Letters(), ask("hello"), "ok", 64)
    told = [token for token in encoded.labels if token != IGNORED]
    assert told == encoded.input_ids[-3:]
    assert told[-1] == Letters.eos_token_id


def test_a_long_prompt_loses_its_beginning():
    encoded = encode(Letters(), ask("x" * 100), "ok", 32)
    assert len(encoded.input_ids) == 32
    assert encoded.reply_length == 3


@pytest.mark.parametrize("reply", ["", "y" * 40])
def test_replies_that_cannot_be_learned_are_refused(reply):
    with pytest.raises(ValueError, match="does not fit"):
        encode(Letters(), ask("x"), reply, 32)


def test_losses_of_a_padded_batch_are_those_of_each_alone(model):
    examples = [encode(Letters(), ask("a" * n), "yes" * (1 + n % 2), 64) for n in (1, 5, 9)]
    losses, mask, _ = token_losses(model, collate(examples, 0))
    for row, example in enumerate(examples):
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0, -example.reply_length - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits, ids[0, -example.reply_length :], reduction="none")
        assert torch.allclose(losses[row][mask[row]], alone, atol=1e-4)


def test_exactness_is_what_greedy_decoding_gives(model):
    prompt = torch.tensor([[5, 9, 11, 30]])
    greedy = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 64]
    examples = [Encoded(ids, [IGNORED] * 4 + ids[4:]) for ids in (greedy, wrong)]
    found = score(model, examples, 0)
    assert found.exact == [1.0, 0.0]
    assert found.loglik[0] == pytest.approx(sum(logprobs(model, greedy)[3:]) / 3, abs=1e-4)


@pytest.fixture
def version(tmp_path, model):
    torch.manual_seed(0)
    trained = adapter.attach(LlamaForCausalLM(CONFIG), None, rank=4, alpha=8, dropout=0.0, seed=0)
    adapter.write(trained, tmp_path / "v1", "tiny")
    artifact.seal(tmp_path / "v1", {"base": BASE.digests}, {"probes": []})
    return tmp_path / "v1"


def test_a_whole_version_is_served(version):
    assert len(artifact.check(version, BASE, 16)) == 64
    assert json.loads((version / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def damaged(version):
    weights = version / adapter.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda v: (v / "COMPLETE").unlink(), "incomplete"),
        (damaged, "changed or damaged"),
        (lambda v: (v / "manifest.json").write_text("{"), "cannot be read"),
        (lambda v: (v / "fingerprint.json").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_version_is_refused(version, damage, said):
    damage(version)
    with pytest.raises(adapter.Unservable, match=said):
        artifact.check(version, BASE, 16)


def test_another_base_is_refused(version):
    with pytest.raises(adapter.Unservable, match="made for another base: its weights"):
        artifact.check(version, BaseModel(None, "tiny", "other", "t", "c"), 16)


def test_too_high_a_rank_is_refused(version):
    with pytest.raises(adapter.Unservable, match=r"over base\.max_rank 2"):
        artifact.check(version, BASE, 2)


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"])
def test_what_vllm_would_serve_wrongly_is_refused(version, key):
    config = json.loads((version / adapter.CONFIG).read_text()) | {key: {"x": 1}}
    (version / adapter.CONFIG).write_text(json.dumps(config))
    with pytest.raises(adapter.Unservable, match=key):
        adapter.check(version, 16)


@pytest.mark.parametrize(("source", "said"), [("builtin:gpt9", "no built-in base"), ("/nowhere", "there is no folder")])
def test_a_base_that_is_not_there(tmp_path, source, said):
    with pytest.raises(BaseMissing, match=said):
        prepare(source, tmp_path)
