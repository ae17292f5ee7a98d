"""The tiny model of the learners' tests, for the mathematics that has one in it."""

from tests.learners.conftest import adapted, model, tokenizer

__all__ = ["adapted", "model", "tokenizer"]
