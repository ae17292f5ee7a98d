"""Thumbs and pairs against closed forms, with the champion as reference, and what they do to good and bad replies."""

import math

import pytest
import torch

from learners import adapter, preference, servable
from learners.encode import encode
from learners.evaluate import logprobs
from learners.ewc import Penalty

SETTINGS = {
    "batch_size": 8,
    "accumulation": 1,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 64,
    "seed": 3,
}
PREFERENCES = {"beta": 0.1, "learning_rate": 2e-3, "epochs": 1, "label_smoothing": 0.1, "imitation": 0.0}
REPLIES = ("yes", "oh no", "maybe so")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tokens(tokenizer, question, reply):
    one = encode(tokenizer, [{"role": "user", "content": question}], reply, 64)
    return one.input_ids[: -one.reply_length], one.input_ids[-one.reply_length :]


@pytest.fixture
def thumbs(tokenizer):
    """Nine: each third one is bad."""
    rows = [(tokens(tokenizer, "a" * (1 + 3 * n % 7), REPLIES[n % 3]), n % 3 == 2) for n in range(9)]
    return [{"prompt_ids": prompt, "bad" if is_bad else "good": reply} for (prompt, reply), is_bad in rows]


@pytest.fixture
def pairs(tokenizer):
    asked = ["b" * (1 + 3 * n % 7) for n in range(8)]
    return [
        {
            "prompt_ids": tokens(tokenizer, a, "x")[0],
            "good": tokens(tokenizer, a, f"yes{n}")[1],
            "bad": tokens(tokenizer, a, "no")[1],
        }
        for n, a in enumerate(asked)
    ]


@pytest.fixture
def shaken(adapted):
    """An adapter that is neither the base nor what it was; and its champion, which is not the base either."""
    torch.manual_seed(1)

    def shake():
        with torch.no_grad():
            for factor in adapter.factors(adapted).values():
                factor.add_(0.05 * torch.randn_like(factor))

    shake()
    champion = copied(adapted)
    shake()
    return adapted, champion


def copied(model):
    return {name: p.detach().clone() for name, p in adapter.factors(model).items()}


@pytest.fixture
def fit(tokenizer, tmp_path):
    """Train one phase; the losses of its steps, and what it tells."""
    folders = iter(range(99))

    def fit(phase, model, champion, rows, held_out=(), *, penalty=None, preferences=(), folder=None, **changes):
        losses = []
        settings = {**SETTINGS, **changes, "preferences": {**PREFERENCES, **dict(preferences)}}
        folder = folder or tmp_path / f"checkpoints{next(folders)}"
        report = lambda told: losses.append(told["loss"])  # noqa: E731
        told = preference.fit(
            phase, model, tokenizer, rows, held_out, champion, settings, "float32", folder, report, penalty
        )  # fmt: skip
        return losses, told

    return fit


def given(model, prompt, reply):
    """The log-probability of a whole reply."""
    return sum(logprobs(model, prompt + reply)[-len(reply) :])


def ratios(model, champion, asked):
    """How much likelier each reply is than under the champion."""
    now = [given(model, *one) for one in asked]
    kept = copied(model)
    put(model, champion)
    then = [given(model, *one) for one in asked]
    put(model, kept)
    return [a - b for a, b in zip(now, then, strict=True)]


def put(model, weights):
    with torch.no_grad():
        for name, factor in adapter.factors(model).items():
            factor.copy_(weights[name])


def to_the_base(model, _):
    """The well-known wrong reference: the base, whatever serves."""
    for name, p in model.named_parameters():
        if ".ref." in name and "lora_B" in name:
            p.data.zero_()


def to_itself(*_):
    """TRL's own reference when nobody says otherwise: the adapter as training finds it, after imitation."""


WRONG = pytest.mark.parametrize("wrong", [to_the_base, to_itself])


def kto(model, champion, thumbs):
    """KTO's loss on one batch, by its formula; the other replies are those of the batch, moved on by one."""
    data = preference._thumbs(thumbs, 9, SETTINGS["seed"])
    z = max(0.0, sum(ratios(model, champion, list(zip(data["prompt_ids"], data["KL_completion_ids"], strict=True)))) / 9)
    of = ratios(model, champion, [(row["prompt_ids"], row.get("good") or row["bad"]) for row in thumbs])
    good = [1 - sigmoid(0.1 * (r - z)) for r, row in zip(of, thumbs, strict=True) if "good" in row]
    bad = [2 * (1 - sigmoid(0.1 * (z - r))) for r, row in zip(of, thumbs, strict=True) if "bad" in row]  # twice as many are good
    return sum(good + bad) / 9


def dpo(model, champion, pairs, smoothing=0.1, imitation=0.2):
    good = ratios(model, champion, [(row["prompt_ids"], row["good"]) for row in pairs])
    bad = ratios(model, champion, [(row["prompt_ids"], row["bad"]) for row in pairs])
    margins = [0.1 * (g - b) for g, b in zip(good, bad, strict=True)]
    robust = [(smoothing * math.log(sigmoid(-u)) - (1 - smoothing) * math.log(sigmoid(u))) / (1 - 2 * smoothing) for u in margins]
    spoken = sum(len(row["good"]) for row in pairs)
    return sum(robust) / 8 - imitation * sum(given(model, row["prompt_ids"], row["good"]) for row in pairs) / spoken


def test_thumbs_give_kto_s_loss_against_the_champion(shaken, fit, thumbs):
    model, champion = shaken
    wanted = kto(model, champion, thumbs)
    assert fit("kto", model, champion, thumbs, batch_size=9)[0] == [pytest.approx(wanted, abs=1e-5)]


@WRONG
def test_another_reference_is_another_kto(shaken, fit, thumbs, monkeypatch, wrong):
    model, champion = shaken
    wanted = kto(model, champion, thumbs)
    monkeypatch.setattr(adapter, "refer", wrong)
    assert fit("kto", model, champion, thumbs, batch_size=9)[0] != [pytest.approx(wanted, abs=1e-3)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("imitation", [0.0, 0.2])
def test_pairs_give_dpo_s_loss_against_the_champion(shaken, fit, pairs, smoothing, imitation):
    model, champion = shaken
    told = {"label_smoothing": smoothing, "imitation": imitation}
    wanted = dpo(model, champion, pairs, smoothing=smoothing, imitation=imitation)
    assert fit("dpo", model, champion, pairs, preferences=told)[0] == [pytest.approx(wanted, abs=1e-5)]


@WRONG
def test_another_reference_is_another_dpo(shaken, fit, pairs, monkeypatch, wrong):
    model, champion = shaken
    wanted = dpo(model, champion, pairs, imitation=0.0)
    monkeypatch.setattr(adapter, "refer", wrong)
    assert fit("dpo", model, champion, pairs)[0] != [pytest.approx(wanted, abs=1e-3)]


def test_at_the_champion_the_losses_are_those_of_not_knowing(shaken, fit, thumbs, pairs):
    model, champion = shaken
    put(model, champion)
    assert fit("dpo", model, champion, pairs)[0] == [pytest.approx(math.log(2), abs=1e-5)]
    put(model, champion)
    assert fit("kto", model, champion, thumbs, batch_size=9)[0] == [pytest.approx((6 + 2 * 3) / 2 / 9, abs=1e-5)]


def test_without_a_champion_the_reference_is_the_base(adapted, fit, pairs):
    """A fresh adapter computes what the base does."""
    fresh = copied(adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for factor in adapter.factors(adapted).values():
            factor.add_(0.05 * torch.randn_like(factor))
    now = [given(adapted, row["prompt_ids"], row["good"]) - given(adapted, row["prompt_ids"], row["bad"]) for row in pairs]
    with adapter.without(adapted):
        then = [given(adapted, row["prompt_ids"], row["good"]) - given(adapted, row["prompt_ids"], row["bad"]) for row in pairs]
    wanted = sum(-math.log(sigmoid(0.1 * (a - b))) for a, b in zip(now, then, strict=True)) / 8
    losses, _ = fit("dpo", adapted, fresh, pairs, preferences={"label_smoothing": 0.0})
    assert losses == [pytest.approx(wanted, abs=1e-5)]


def likelihoods(model, rows, side):
    return sum(given(model, row["prompt_ids"], row[side]) for row in rows if side in row)


@pytest.mark.parametrize("phase", ["kto", "dpo"])
@pytest.mark.parametrize("is_flipped", [False, True])
def test_good_replies_become_likelier_and_bad_ones_are_never_imitated(shaken, fit, thumbs, pairs, phase, is_flipped):
    model, champion = shaken
    rows = thumbs if phase == "kto" else pairs
    before = {side: likelihoods(model, rows, side) for side in ("good", "bad")}
    swap = {"prompt_ids": "prompt_ids", "good": "bad", "bad": "good"}
    learned = [{swap[name]: ids for name, ids in row.items()} for row in rows] if is_flipped else rows
    fit(phase, model, champion, learned, preferences={"epochs": 3})
    after = {side: likelihoods(model, rows, side) for side in ("good", "bad")}
    assert (after["good"] > before["good"]) is not is_flipped
    assert (after["bad"] < before["bad"]) is not is_flipped


def test_the_champion_stays_and_nothing_of_it_is_left_in_the_result(shaken, fit, pairs, tmp_path, monkeypatch):
    model, champion = shaken
    seen = {}
    drop = adapter.drop_reference

    def look(model):
        seen.update({n.replace(".ref.", "."): p.detach().clone() for n, p in model.named_parameters() if ".ref." in n})
        drop(model)

    monkeypatch.setattr(adapter, "drop_reference", look)
    before = copied(model)
    fit("dpo", model, champion, pairs, preferences={"epochs": 2})
    assert all(torch.equal(seen[name], weights) for name, weights in champion.items())
    assert any(not torch.equal(before[name], weights) for name, weights in copied(model).items())
    adapter.write(model, tmp_path / "version", "tiny")
    assert sorted(path.name for path in (tmp_path / "version").iterdir()) == [servable.CONFIG, servable.WEIGHTS]
    servable.check(tmp_path / "version", 16)
    assert not [name for name, _ in model.named_parameters() if ".ref." in name]


def test_a_penalty_stands_beside_the_loss_whole_in_each_step(shaken, fit, pairs):
    model, champion = shaken
    wanted = dpo(model, champion, pairs, imitation=0.0)
    now = copied(model)
    fisher = {name: torch.ones_like(p) for name, p in now.items()}
    put(model, champion)
    penalty = Penalty(adapter.factors(model), fisher, 0.04)
    put(model, now)
    added = 0.02 * sum(float((now[name] - champion[name]).square().sum()) for name in now)
    assert added > 0.1
    losses, told = fit("dpo", model, champion, pairs, penalty=penalty, batch_size=2, accumulation=4)
    assert losses == [pytest.approx(wanted + added, abs=1e-4)]
    assert told["dpo_penalty"] > 0


def test_what_is_held_out_is_measured_and_changes_nothing(shaken, fit, pairs):
    model, champion = shaken
    before = copied(model)
    _, alone = fit("dpo", model, champion, pairs[:6])
    weights = copied(model)
    put(model, before)
    _, told = fit("dpo", model, champion, pairs[:6], pairs[6:])
    assert all(torch.equal(weights[name], p) for name, p in copied(model).items())
    assert told["dpo_items"] == 6
    assert told.keys() - alone.keys() == {"dpo_held_out_loss", "dpo_held_out_margin", "dpo_held_out_accuracy"}


@pytest.mark.parametrize(("items", "wanted", "size"), [(9, 8, 9), (16, 8, 8), (17, 8, 9), (17, 1, 3), (2, 8, 8)])
def test_no_thumb_is_alone_in_its_batch(items, wanted, size):
    """Its own ratio would be the z that it is compared with."""
    assert preference.kto_batch(items, wanted) == size
