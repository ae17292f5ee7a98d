"""A stream of lessons on the tiny model, one strategy beside the other: what must hold of them, whatever the base.

The same plans, penalties and trainer as in a job; scores are mean log-probabilities of right replies to questions that were not
learned, in nats. A regression test, not a benchmark: the real one is `learnd bench learning`.
"""

from dataclasses import replace
from itertools import pairwise

import pytest

from learners import adapter
from learners.encode import encode, key_of
from learners.evaluate import score
from learners.matrix import transfer
from learners.strategy import STRATEGIES
from learners.trainer import fit
from replay.buffer import fill
from replay.records import Example, Split

SETTINGS = {
    "learning_rate": 0.005,
    "epochs": 4,
    "batch_size": 8,
    "accumulation": 1,
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "early_stopping_patience": 0,
    "seed": 3,
    "ewc_kappa": 1.0,
    "ewc_gamma": 0.95,
    "ewc_sequences": 512,
    "der_alpha": 0.5,
    "der_beta": 0.5,
    "olora_lambda": 0.5,
    "rank": 4,
}
LESSONS = {"planes": ("yes", "oh no"), "trains": ("left", "right?")}
TAUGHT, ASKED = 100, 24


def example(lesson, n):
    asked, split = ({"role": "user", "content": f"{lesson} {n}"},), Split.TRAIN if n < TAUGHT else Split.HOLDOUT
    return Example(f"{lesson}{n}", f"i{n}", f"f{n}", "desk", lesson, asked, LESSONS[lesson][n % 2], split)


class Stream:
    """Learns the lessons in turn; the first one, which is the same for all, once."""

    def __init__(self, base, tokenizer, folder):
        self.base, self.tokenizer, self.folder, self.jobs = base, tokenizer, folder, 0
        self.lessons = {name: [example(name, n) for n in range(TAUGHT)] for name in LESSONS}
        self.exams = {name: self.encoded(example(name, n) for n in range(TAUGHT, TAUGHT + ASKED)) for name in LESSONS}
        self.start = self.marks(self.model())
        first = self.learn(STRATEGIES["ewc"].plan(self.lessons["planes"], [], [], 0.0, 0))
        self.champion = {name: p.detach().clone() for name, p in adapter.factors(first).items()}
        self.after_first = self.marks(first)
        learned = self.encoded(self.lessons["planes"])
        self.state = STRATEGIES["ewc+der++"].consolidate(first, adapter.factors(first), {}, learned, 1, SETTINGS)

    def encoded(self, examples):
        return [replace(encode(self.tokenizer, e.messages, e.reply, 64), key=key_of(e.id)) for e in examples]

    def model(self):
        model, _ = adapter.load_base(self.base, "float32")
        return adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)

    def learn(self, plan, start=None, strategy=STRATEGIES["naive"]):
        model, self.jobs = self.model(), self.jobs + 1
        for name, p in adapter.factors(model).items() if start else ():
            p.data.copy_(start[name])
        if strategy.is_stacked:
            adapter.stack(model, SETTINGS["seed"])
        state = self.state if start else {}
        tokens = sum(e.reply_length for e in self.encoded(plan))
        penalty = strategy.penalty(adapter.factors(model), state, tokens, SETTINGS)
        distillation = strategy.distillation(self.encoded(e for e in plan if e.source == "remembered"), state, SETTINGS)
        where = self.folder / str(self.jobs)
        fit(model, self.tokenizer, self.encoded(plan), [], SETTINGS, "float32", where, lambda _: None, penalty, distillation)
        if strategy.is_stacked:
            adapter.compress(model, SETTINGS["rank"])
        return model

    def marks(self, model):
        return [sum(score(model, exam, 1).loglik) / len(exam) for exam in self.exams.values()]

    def transfer(self, name, ratio=0.0):
        """What two lessons in turn come to under a strategy; joint training has them at once and no matrix."""
        strategy, memory = STRATEGIES[name], fill(self.lessons["planes"], 5000).examples()
        plan = strategy.plan(self.lessons["trains"], memory, [], ratio, 0)
        last = self.marks(self.learn(plan, None if strategy.is_from_base else self.champion, strategy))
        return transfer([self.after_first, last], self.start), last[1] - self.after_first[1]


@pytest.fixture(scope="module")
def stream(base, tokenizer, tmp_path_factory):
    made = Stream(base.path, tokenizer, tmp_path_factory.mktemp("stream"))
    return {name: made.transfer(name, 0.1) for name in ("joint", "replay", "der++", "naive", "ewc", "o-lora")}


def test_rehearsal_ends_between_joint_training_and_none(stream):
    """One example rehearsed for each hundred is not told from none: docs/log.md has the figures."""
    averages = [stream[name][0].average for name in ("joint", "replay", "naive")]
    assert all(better > worse for better, worse in pairwise(averages)), averages


def test_without_any_it_forgets(stream):
    transferred, gained = stream["naive"]
    assert transferred.backward < -1
    assert gained > 2


def test_ewc_forgets_less_and_still_learns(stream):
    assert stream["ewc"][0].backward > stream["naive"][0].backward
    assert stream["ewc"][1] > 0.8 * stream["naive"][1]


def test_rehearsing_what_was_thought_ends_with_plain_rehearsal(stream):
    assert stream["der++"][0].average > stream["replay"][0].average - 0.5
    assert stream["der++"][0].backward > stream["naive"][0].backward


def test_a_compressed_sum_of_two_lessons_holds_both(stream):
    """It forgets no less than none beside it here, where all prompts look alike: docs/log.md has the figures."""
    assert stream["o-lora"][1] > 0.8 * stream["naive"][1]
    assert stream["o-lora"][0].average > stream["naive"][0].average - 0.5
