"""How a candidate compares with its champion beside held-out slices: golden suites, neutral texts, lengths of replies.

`before` is measured with the champion's weights and kept in the job's folder, `after` with the candidate's; the gate judges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from learners import adapter
from learners.artifact import flush
from learners.encode import Encoded, Unencodable, encode
from learners.evaluate import distributions, divergence, reply_lengths, score

Json = dict[str, Any]

NEUTRAL_FILE = "neutral.safetensors"
NEUTRAL = (
    "The museum is open from nine to five on weekdays and closes an hour earlier on Sundays.",
    "Water boils at a lower temperature on a mountain, because the air presses less on it.",
    "She put the letter back in its envelope, thought for a while, and went out into the garden.",
    "def add(a, b):\n    return a + b\n",
    "Q: What is the capital of Italy?\nA: The capital of Italy is Rome.",
    "Dear Sir or Madam, I am writing to ask whether the room is still free in the first week of May.",
    "1, 2, 4, 8, 16, 32, 64, 128",
    "In the spring the river rises, and the fields beside it stand under water for some weeks.",
)
"""Texts about nothing that a line learns: how far a candidate strays on them is how much else it has changed."""
MOST_PROMPTS, MOST_TOKENS = 32, 48
"""Prompts that are answered for the length of replies, and the tokens of each that count."""


class Comparison:
    """Of one job; `older` are the held-out examples of what was learned before."""

    def __init__(self, folder: Path, tokenizer: Any, max_length: int, older: Sequence[Encoded]) -> None:
        """Raises `ValueError` for a golden item that cannot be encoded."""
        self._folder, self._tokenizer = folder, tokenizer
        file = folder / "suites.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self._suites = {name: list(found) for name, found in groupby(rows, lambda row: str(row["suite"]))}
        self._golden = {
            name: [_encoded(row, tokenizer, max_length) for row in found] for name, found in self._suites.items()
        }  # fmt: skip
        asked = [*older, *(item for items in self._golden.values() for item in items)]
        self._prompts = asked[:: max(1, -(-len(asked) // MOST_PROMPTS))]

    def before(self, model: Any) -> Json:
        """What the base and the champion give; the champion's distributions are kept in a file."""
        aside = self._folder / f".{NEUTRAL_FILE}"
        save_file({"logprobs": distributions(model, self._neutral())}, aside)
        flush(aside)
        aside.rename(self._folder / NEUTRAL_FILE)
        suites = {}
        for name, items in self._golden.items():
            with adapter.without(model):
                base = score(model, items, self._tokenizer.pad_token_id).as_json()
            suites[name] = {"base": base, "champion": score(model, items, self._tokenizer.pad_token_id).as_json()}
        return {"suites": suites, "lengths": self._lengths(model)}

    def after(self, model: Any, before: Json) -> Json:
        """What the candidate gives beside it, as parts of `evaluation.json`."""
        suites = {
            name: {
                "ids": [row["id"] for row in rows],
                "must_pass": [row["must_pass"] for row in rows],
                **before["suites"][name],
                "candidate": score(model, self._golden[name], self._tokenizer.pad_token_id).as_json(),
            }
            for name, rows in self._suites.items()
        }
        champion = load_file(self._folder / NEUTRAL_FILE)["logprobs"]
        kl = divergence(distributions(model, self._neutral()), champion)
        lengths = {"champion": before["lengths"], "candidate": self._lengths(model)} if self._prompts else None
        return {"suites": suites, "kl": kl, "lengths": lengths}

    def _neutral(self) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEUTRAL]

    def _lengths(self, model: Any) -> list[int]:
        pad, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        return reply_lengths(model, self._prompts, pad, end, MOST_TOKENS)


def _encoded(row: Json, tokenizer: Any, max_length: int) -> Encoded:
    try:
        return encode(tokenizer, row["messages"], row["reply"], max_length)
    except Unencodable as error:
        raise ValueError(f"item {row['id']!r} of the golden suite {row['suite']!r}: {error}") from None
