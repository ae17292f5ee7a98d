"""Does it forget less? Two lessons in turn on the tiny model, each measured on questions that were not learned."""

from itertools import pairwise

import pytest
import torch

from learners import adapter
from learners.encode import encode
from learners.evaluate import score
from learners.ewc import Ewc
from learners.naive import Naive
from learners.trainer import fit

SETTINGS = {
    "learning_rate": 0.005,
    "epochs": 8,
    "batch_size": 8,
    "accumulation": 1,
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "early_stopping_patience": 0,
    "seed": 3,
    "ewc_gamma": 0.95,
    "ewc_sequences": 512,
}
LESSONS = {"planes": ("yes", "oh no"), "trains": ("left", "right?")}


class School:
    """Learns planes once, then trains as often as asked, always from there."""

    def __init__(self, base, tokenizer, folder):
        self.base, self.tokenizer, self.folder, self.jobs = base, tokenizer, folder, 0
        self.lessons = {name: self.questions(name, range(48)) for name in LESSONS}
        self.exams = {name: self.questions(name, range(48, 72)) for name in LESSONS}
        first = self.learn("planes", None)
        self.champion = {name: p.detach().clone() for name, p in adapter.factors(first).items()}
        self.before = self.marks(first)
        self.fisher = Ewc(Naive()).consolidate(first, adapter.factors(first), {}, self.lessons["planes"], 1, SETTINGS)

    def questions(self, lesson, numbers):
        asked = [([{"role": "user", "content": f"{lesson} {n}"}], LESSONS[lesson][n % 2]) for n in numbers]
        return [encode(self.tokenizer, messages, reply, 64) for messages, reply in asked]

    def learn(self, lesson, penalised):
        model, _ = adapter.load_base(self.base, "float32")
        model = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)
        penalty = penalised(adapter.factors(model)) if penalised else None
        self.jobs += 1
        folder = self.folder / str(self.jobs)
        fit(model, self.tokenizer, self.lessons[lesson], [], SETTINGS, "float32", folder, lambda _: None, penalty)
        return model

    def marks(self, model):
        """Mean log-probability of a right reply's tokens, in nats."""
        return {name: sum(score(model, exam, 1).loglik) / len(exam) for name, exam in self.exams.items()}

    def transfer(self, kappa, fisher=None):
        """What learning trains does to planes, and what it gains on trains, in nats."""
        tokens = sum(e.reply_length for e in self.lessons["trains"])

        def warm_start(factors):
            with torch.no_grad():
                for name, p in factors.items():
                    p.copy_(self.champion[name])
            return Ewc(Naive()).penalty(factors, fisher or self.fisher, tokens, {"ewc_kappa": kappa})

        after = self.marks(self.learn("trains", warm_start))
        return tuple(after[name] - self.before[name] for name in LESSONS)


@pytest.fixture(scope="module")
def school(base, tokenizer, tmp_path_factory):
    return School(base.path, tokenizer, tmp_path_factory.mktemp("school"))


@pytest.fixture(scope="module")
def naive(school):
    return school.transfer(0.0)


def test_without_a_penalty_it_forgets(naive):
    forgotten, gained = naive
    assert forgotten < -2
    assert gained > 5


@pytest.mark.parametrize(("kappa", "forgets", "gains"), [(1.0, 0.95, 0.98), (10.0, 0.7, 0.9)])
def test_under_ewc_it_forgets_less_and_learns_nearly_as_much(school, naive, kappa, forgets, gains):
    forgotten, gained = school.transfer(kappa)
    assert forgotten > forgets * naive[0]
    assert gained > gains * naive[1]


def test_more_weight_forgets_less_over_eight_decades_and_never_breaks(school, naive):
    course = [naive, *(school.transfer(kappa) for kappa in (1.0, 1e2, 1e4, 1e8))]
    forgotten = [kept for kept, _ in course]
    assert all(later > earlier - 0.01 for earlier, later in pairwise(forgotten))
    assert abs(forgotten[-1]) < 0.02, "what the first version can do is held fast"


def test_it_is_the_fisher_that_knows_what_to_hold(school):
    """A bowl that is as steep on the whole but the same in all directions holds less and hinders more."""
    size = sum(f.numel() for f in school.fisher.values())
    mean = sum(float(f.sum()) for f in school.fisher.values()) / size
    round_bowl = {name: torch.full_like(f, mean) for name, f in school.fisher.items()}
    forgotten, gained = school.transfer(30.0)
    worse_forgotten, worse_gained = school.transfer(30.0, round_bowl)
    assert forgotten > worse_forgotten
    assert gained > 1.1 * worse_gained
