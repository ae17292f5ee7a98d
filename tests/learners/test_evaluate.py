import pytest
import torch

from learners.encode import IGNORED, Encoded
from learners.evaluate import logprobs, score


def test_exactness_is_what_greedy_decoding_gives(model):
    prompt = torch.tensor([[5, 9, 11, 30]])
    greedy = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None
    )[0].tolist()
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 64]
    longer = [*greedy[:2], *greedy]
    examples = [Encoded(ids, [IGNORED] * (len(ids) - 3) + ids[-3:]) for ids in (greedy, wrong, longer)]
    found = score(model, examples, 1)
    assert found.exact[:2] == [1.0, 0.0]
    assert found.loglik == pytest.approx([sum(logprobs(model, e.input_ids)[-3:]) / 3 for e in examples], abs=1e-4)


def test_order_and_batches_do_not_matter(model):
    rows = [Encoded(list(range(2, n)), [IGNORED] * (n - 4) + [n - 2, n - 1]) for n in (9, 5, 30, 12, 7)]
    whole = score(model, rows, 1)
    assert score(model, rows[::-1], 1, batch_size=2).loglik[::-1] == pytest.approx(whole.loglik, abs=1e-4)


def test_nothing_to_score(model):
    assert score(model, [], 1).as_json() == {"exact": [], "loglik": []}


def test_the_mode_is_left_as_it_was(model):
    model.train()
    score(model, [Encoded([3, 4], [IGNORED, 4])], 1)
    assert model.training
