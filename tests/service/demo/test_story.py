import io
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from rich.console import Console

from service.demo.outcome import broken_promises, summary
from service.demo.plan import DemoFailed, Plan
from service.demo.screen import Screen
from service.demo.story import Options, Story, run
from service.demo.texts import Deck, Text
from service.demo.watch import Watch
from tests.service.demo.fake_daemon import FakeDaemon

QUICK = Plan(
    training_load=0.9,
    corrections=16,
    correction_delay_seconds=(0.0, 0.0),
    thumb_delay_seconds=(0.0, 0.0),
    failed_pause_seconds=0.0,
    measured=10,
    poll_seconds=0.0,
)
LABELS = {"airline": ("negative", "neutral", "positive"), "headlines": ("sports", "tech")}


@pytest.fixture
def texts() -> list[Text]:
    return [Text(s, f"{label} text {i}", label) for s, labels in LABELS.items() for label in labels for i in range(200)]


@asynccontextmanager
async def story(fake: FakeDaemon, texts: list[Text], plan: Plan = QUICK, alive: bool = True) -> AsyncIterator[Story]:
    ticks = iter(range(10**9))

    def clock() -> float:
        return next(ticks) / 1000

    transport = httpx.ASGITransport(fake.app())
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://daemon") as http,
        httpx.AsyncClient(transport=transport) as inner,
    ):
        client = openai.AsyncOpenAI(base_url="http://daemon/v1", api_key="none", max_retries=0, http_client=inner)
        watch = Watch(http, clock, lambda: alive)
        yield Story(plan, http, client, Deck(texts, 1), watch, Screen(Console(file=io.StringIO())), clock)


async def test_two_skills_are_learned_one_after_the_other(texts):
    fake = FakeDaemon(texts, enough=14)
    async with story(fake, texts) as played:
        outcome = await played.play()
    said = summary(outcome)
    assert broken_promises(outcome) == []
    assert said["skills"]["airline"] == {"base": 0.0, "v1": 1.0, "v2": 1.0}
    assert said["skills"]["headlines"] == {"base": 0.0, "v1": 0.0, "v2": 1.0}
    assert said["promotions"] == 2
    assert said["requests"] == fake.requests
    assert said["feedback_acknowledged"] == said["feedback_stored"] == len(fake.feedback)
    assert said["examples_trained"] == fake.trained > 28
    assert said["swap_seconds"] == [0.5, 0.5]
    assert said["feedback_to_live_seconds"] == [41.0, 42.0]
    for skill in LABELS:
        assert played.tally.score(skill, "v2").asked >= QUICK.measured
        assert played.tally.score(skill, "base").asked >= QUICK.measured
    assert {one.trial for one in outcome.evidence} == {"trial-1", "trial-2"}
    _corrections_go_to_taught_texts_and_thumbs_to_the_others(fake, texts)


def _corrections_go_to_taught_texts_and_thumbs_to_the_others(fake: FakeDaemon, texts: list[Text]) -> None:
    by_prompt = {text.prompt: text for text in texts}
    for letter in fake.feedback.values():
        text = by_prompt[fake.asked[letter["inference_id"]]]
        assert text.is_taught == (letter["metric_name"] == "demonstration")
    corrections = [one for one in fake.feedback.values() if one["metric_name"] == "demonstration"]
    assert len(corrections) == 2 * QUICK.corrections
    assert 1 <= fake.requests / len(fake.sessions) <= 3


async def test_a_trial_that_ends_badly_ends_the_story(texts):
    async with story(FakeDaemon(texts, enough=14, trial_ends="rolled_back"), texts) as played:
        with pytest.raises(DemoFailed, match="trial trial-1 rolled_back: told so"):
            await played.play()


async def test_the_story_ends_when_its_time_is_over(texts):
    fake = FakeDaemon(texts, enough=10**6)
    async with story(fake, texts, Plan(**{**_fields(QUICK), "limit_seconds": 0.2})) as played:
        with pytest.raises(DemoFailed, match="0 s are over while the desk answers airline tweets"):
            await played.play()


async def test_a_dead_daemon_is_noticed(texts):
    async with story(FakeDaemon(texts, enough=14), texts, alive=False) as played:
        with pytest.raises(DemoFailed, match="process has ended"):
            await played.play()


def _fields(plan: Plan) -> dict:
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_interrupted_demo_leaves_its_data_only_when_it_was_asked_to(is_kept, tmp_path, monkeypatch):
    def interrupted(_options, data, _log, _console):
        (data / "ledger.db").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("service.demo.story._with_daemon", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(Options(folder=tmp_path / "report", is_kept=is_kept))
    assert len(list(tmp_path.glob("learnd-demo-*/ledger.db"))) == is_kept
