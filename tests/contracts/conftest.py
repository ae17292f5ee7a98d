"""The contracts share the tiny base of the learners' tests."""

from tests.learners.conftest import base

__all__ = ["base"]
