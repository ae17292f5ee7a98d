"""Two lessons in a row on the real engine: trained, gated, tried on live traffic, promoted, on two replicas, without a failed or wrong reply.

The lessons are opposite on purpose ("always say red", "always say blue"), so each reply shows which adapter made it.
"""

import itertools
import threading
import time

import httpx
import openai
import pytest

COLOURS = ("red", "blue")


class Traffic(threading.Thread):
    """Customers who ask all the while, thumb each reply by whether it names the wanted colour, and note what failed."""

    def __init__(self, client, daemon):
        super().__init__(daemon=True)
        self.client, self.url = client, daemon.url
        self.wanted = COLOURS[0]
        self.replies, self.failures = [], []
        self.done = threading.Event()
        self.numbers = itertools.count()

    def run(self):
        while not self.done.is_set():
            number = next(self.numbers)
            try:
                reply = self.client.chat.completions.create(
                    model="desk",
                    messages=question(number),
                    max_tokens=6,
                    temperature=0,
                    extra_headers={"x-session-id": f"customer-{number}"},
                )
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
                continue
            said = reply.choices[0].message.content
            self.replies.append((reply.model, said))
            thumb = {"inference_id": reply.id, "metric_name": "thumb", "value": self.wanted in said.lower()}
            httpx.post(f"{self.url}/feedback", json=thumb).raise_for_status()


def question(number):
    return [{"role": "user", "content": f"What is the colour of item {number}?"}]


def teach(client, url, colour, numbers):
    for number in numbers:
        asked = client.chat.completions.create(model="desk", messages=question(number), max_tokens=4, temperature=0)
        body = {"inference_id": asked.id, "metric_name": "demonstration", "value": colour, "id": f"{colour}-{number}"}
        httpx.post(f"{url}/feedback", json=body).raise_for_status()


def champion(url):
    return httpx.get(f"{url}/api/status").json()["lines"]["desk"]["champion"]


def wait_for(what, seconds, describe):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def story(client, daemon):
    """The two lessons under traffic; the tests below look at what happened."""
    traffics = [Traffic(client, daemon) for _ in range(2)]
    for traffic in traffics:
        traffic.start()
    for lesson, colour in enumerate(COLOURS, 1):
        for traffic in traffics:
            traffic.wanted = colour
        teach(client, daemon.url, colour, range(10_000 * lesson, 10_000 * lesson + 48))
        wait_for(
            lambda lesson=lesson: champion(daemon.url) == f"desk@v{lesson}",
            1200,
            lambda: httpx.get(f"{daemon.url}/api/status").text + daemon.tail(),
        )
    for traffic in traffics:
        traffic.done.set()
        traffic.join(60)
    return traffics


def test_no_request_failed(story):
    assert [failure for traffic in story for failure in traffic.failures] == []


def test_each_reply_names_the_version_that_made_it(story):
    replies = [reply for traffic in story for reply in traffic.replies]
    for lesson in (1, 2):
        said = [text for model, text in replies if model == f"desk@v{lesson}"]
        assert said, f"v{lesson} never answered"
        other = COLOURS[2 - lesson]
        assert not [text for text in said if other in text.lower()], f"v{lesson} spoke with the other's voice"


def test_both_replicas_hold_champion_and_previous(story, daemon):
    replicas = httpx.get(f"{daemon.url}/api/status").json()["replicas"]
    assert len(replicas) == 2
    assert all({"desk@v1", "desk@v2"} <= set(replica["resident"]) for replica in replicas)


def test_each_promotion_has_its_evidence(story, daemon):
    changes = httpx.get(f"{daemon.url}/api/lines/desk/history").json()["data"]
    promoted = [change for change in changes if change["alias"] == "champion"]
    assert [change["to"] for change in promoted] == ["desk@v2", "desk@v1"]
    assert all(change["evidence"] for change in promoted)


def test_examples_were_trained_once_and_held_out_ones_never(story, daemon):
    versions = httpx.get(f"{daemon.url}/api/lines/desk/versions").json()["data"]
    assert len(versions) == 2


def test_rollback_brings_the_previous_voice_back(story, client, daemon):
    httpx.post(f"{daemon.url}/api/lines/desk/rollback", json={}).raise_for_status()
    wait_for(lambda: champion(daemon.url) == "desk@v1", 30, daemon.tail)
    wait_for(lambda: ask(client).model == "desk@v1", 30, daemon.tail)
    assert "red" in ask(client).choices[0].message.content.lower()


def ask(client):
    return client.chat.completions.create(model="desk", messages=question(77), max_tokens=6, temperature=0)


def test_a_killed_replica_comes_back_holding_its_adapters(story, client, daemon):
    victim = daemon.processes("ServeReplica:engine")[0]
    victim.kill()
    wait_for(lambda: len(daemon.processes("ServeReplica:engine")) == 2, 240, daemon.tail)
    wait_for(lambda: len(httpx.get(f"{daemon.url}/api/status").json()["replicas"]) == 2, 240, daemon.tail)
    replicas = httpx.get(f"{daemon.url}/api/status").json()["replicas"]
    assert all("desk@v1" in replica["resident"] for replica in replicas)
    assert ask(client).model == "desk@v1"
