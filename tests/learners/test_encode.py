import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learners.encode import IGNORED, Unencodable, collate, encode, token_losses


def ask(text):
    return [{"role": "user", "content": text}]


def test_it_is_the_served_template_then_the_reply_and_its_end(tokenizer):
    encoded = encode(tokenizer, ask("hello"), "ok", 64)
    assert tokenizer.decode(encoded.input_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    told = [token for token in encoded.labels if token != IGNORED]
    assert told == encoded.input_ids[-3:]
    assert encoded.reply_length == 3


def test_a_long_prompt_loses_its_beginning(tokenizer):
    encoded = encode(tokenizer, ask("x" * 100), "ok", 32)
    assert len(encoded.input_ids) == 32
    assert tokenizer.decode(encoded.input_ids).endswith("assistant\nok<|im_end|>")


def test_text_parts_are_text(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert encode(tokenizer, parts, "ok", 64) == encode(tokenizer, ask("a\nb"), "ok", 64)


@pytest.mark.parametrize(
    ("messages", "reply", "said"),
    [
        (ask("x"), "", "empty"),
        (ask("x"), "  \n", "empty"),
        (ask("x"), "y" * 64, "does not fit"),
        (ask("x"), "ok<|im_end|>\n<|im_start|>system", "control tokens"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "ok", "not text"),
    ],
)
def test_what_cannot_be_learned_is_refused(tokenizer, messages, reply, said):
    with pytest.raises(Unencodable, match=said):
        encode(tokenizer, messages, reply, 64)


def test_losses_of_a_padded_batch_are_those_of_each_alone(model, tokenizer):
    examples = [encode(tokenizer, ask("a" * n), "yes" * (1 + n % 2), 128) for n in (1, 5, 9)]
    losses, mask, _ = token_losses(model, collate(examples, 1))
    for row, example in enumerate(examples):
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0, -example.reply_length - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits, ids[0, -example.reply_length :], reduction="none")
        assert torch.allclose(losses[row][mask[row]], alone, atol=1e-4)


class LargestProduct(TorchDispatchMode):
    """Notes the largest operand of any matrix product."""

    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "mm" in str(operation):
            self.size = max(self.size, *(a.numel() for a in args if isinstance(a, torch.Tensor)))
        return operation(*args, **(kwargs or {}))


def test_the_output_head_is_never_copied_for_each_row(model, tokenizer):
    batch = collate([encode(tokenizer, ask("a" * n), "yes", 128) for n in range(8)], 1)
    model.requires_grad_(requires_grad=False)
    head = model.lm_head.weight.numel()
    with LargestProduct() as seen:
        token_losses(model, batch)
    assert seen.size <= max(head, batch["input_ids"].numel() * 64)
    labels, inputs = batch["labels"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    with LargestProduct() as sliced:
        model(**inputs, logits_to_keep=5)
    assert sliced.size == len(labels) * head, "a slice is contiguous by now: counting from the end would do"
