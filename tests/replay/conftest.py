"""Builders of records with plain defaults, and a ledger in a temporary folder."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, create_engine

from replay import ledger
from replay.records import Arm, Example, Feedback, Interaction, Split

Build = Callable[..., object]


@pytest.fixture(scope="session")
def asked() -> Build:
    def build(name: str = "a1", prompt: str | None = None, **fields: object) -> Interaction:
        plain = {
            "line": "desk",
            "version": "desk@v1",
            "arm": Arm.CHAMPION,
            "unit": f"unit-{name}",
            "slice": "airline",
            "messages": ({"role": "user", "content": prompt or f"question {name}"},),
            "reply": "a guess",
            "at": 100.0,
        }
        return Interaction(id=name, **{**plain, **fields})

    return build


@pytest.fixture(scope="session")
def said() -> Build:
    def build(about: str = "a1", value: object = "positive", **fields: object) -> Feedback:
        plain = {"id": f"f-{about}", "metric_name": "demonstration", "occurred_at": 110.0, "received_at": 110.0}
        return Feedback(inference_id=about, value=value, **{**plain, **fields})

    return build


@pytest.fixture(scope="session")
def learned() -> Build:
    def build(name: str, **fields: object) -> Example:
        plain = {
            "interaction_id": f"a-{name}",
            "feedback_id": f"f-{name}",
            "line": "desk",
            "slice": "airline",
            "messages": ({"role": "user", "content": f"question {name}"},),
            "reply": "positive",
            "split": Split.TRAIN,
        }
        return Example(id=name, **{**plain, **fields})

    return build


@pytest.fixture
def conn() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        ledger.create(connection)
        yield connection
    engine.dispose()
