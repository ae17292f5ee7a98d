"""A floor to beat: a logistic regression over TF-IDF, taught as many examples of one task alone."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from replay.records import Example


def regression(taught: list[Example], exam: list[Example]) -> float:
    """Accuracy of a logistic regression over TF-IDF of words (ridge 1, as scikit-learn's default): a floor to beat."""
    words = sorted({word for e in taught for word in _words(e)})
    labels = sorted({e.reply for e in taught})
    counts = [torch.tensor([[_words(e).count(word) for word in words] for e in rows]).float() for rows in (taught, exam)]
    weight = ((1 + len(taught)) / (1 + (counts[0] > 0).sum(0))).log() + 1
    x, z = (torch.nn.functional.normalize(c * weight) for c in counts)
    y = torch.tensor([labels.index(e.reply) for e in taught])
    w, b = torch.zeros(len(words), len(labels), requires_grad=True), torch.zeros(len(labels), requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ w + b, y, reduction="sum") + w.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    guesses = (z @ w + b).argmax(-1).tolist()
    return statistics.fmean(float(labels[guess] == e.reply) for guess, e in zip(guesses, exam, strict=True))


def _words(example: Example) -> list[str]:
    said = str(example.messages[0]["content"]).split("\n", 1)[1].lower()
    return "".join(c if c.isalnum() else " " for c in said).split()
