import math

import pytest
import torch

from learners.encode import IGNORED, Encoded
from learners.evaluate import distributions, divergence, logprobs, reply_lengths, score


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


def test_the_divergence_is_that_of_the_definition_and_not_its_neighbours():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]), torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]])

    def plain(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))

    found = divergence(p.log(), q.log())
    assert found == pytest.approx(plain(p, q) / 2, abs=1e-6)
    assert found != pytest.approx(plain(q, p) / 2, abs=1e-2), "the control: champion against candidate"
    assert found != pytest.approx(plain(p, q) / 6, abs=1e-2), "the control: a mean over the vocabulary"
    assert divergence(p.log(), p.log()) == 0


def test_distributions_are_those_after_each_token(model):
    texts = [[5, 9, 11, 30], [7, 2]]
    found = distributions(model, texts)
    assert found.shape == (4, 258)
    assert found.exp().sum(-1) == pytest.approx(torch.ones(4), abs=1e-5)
    assert [found[i, t].item() for i, t in enumerate((9, 11, 30))] == pytest.approx(logprobs(model, texts[0]), abs=1e-5)


def test_lengths_are_those_of_greedy_replies(model):
    prompts = [[5, 9, 11, 30], [7, 2], [40, 41, 42, 43, 44, 45]]
    examples = [Encoded([*ids, 3], [IGNORED] * len(ids) + [3]) for ids in prompts]
    plain = []
    for ids in prompts:
        asked = torch.tensor([ids])
        said = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=None
        )
        plain.append(said[0, len(ids) :].tolist())
    for end in {plain[0][3], plain[1][0], plain[2][11], 999}:
        wanted = [said.index(end) if end in said else 12 for said in plain]
        assert reply_lengths(model, examples, 1, end, 12) == wanted
        assert reply_lengths(model, examples, 1, end, 12, batch_size=1) == wanted
    assert reply_lengths(model, [], 1, 1, 12) == []
