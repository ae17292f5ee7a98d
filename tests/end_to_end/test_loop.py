"""Two lessons in a row on the real engine: trained, gated, tried on live traffic, promoted, on two replicas, without a failed or wrong reply.

The lessons are opposite on purpose ("always say red", "always say blue"), so each reply shows which adapter made it.
"""

import json
import time

import httpx
import pytest

from tests.end_to_end.desk import COLOURS, Traffic, ask, champion, paced, teach, wait_for


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
            lambda lesson=lesson: paced(daemon.url, traffics)["champion"] == f"desk@v{lesson}",
            1200,
            lambda: httpx.get(f"{daemon.url}/api/status").text + daemon.tail(),
        )
    for traffic in traffics:
        traffic.done.set()
        traffic.join(60)
    return traffics


def test_no_request_failed(story):
    assert [failure for traffic in story for failure in traffic.failures] == []


def test_each_reply_names_the_version_that_made_it(story, client):
    """A version that did not learn its lesson to the last item says the other colour of itself too, when asked by its name."""
    replies = [reply for traffic in story for reply in traffic.replies]
    for lesson, other in enumerate(reversed(COLOURS), 1):
        own = [reply for reply in replies if reply.model == f"desk@v{lesson}"]
        assert own, f"v{lesson} never answered"
        strange = [reply for reply in own if other in reply.said.lower()]
        assert len(strange) < 0.02 * len(own), f"v{lesson} spoke with the other's voice"
        said = [ask(client, reply.model, reply.number).choices[0].message.content for reply in strange]
        assert said == [reply.said for reply in strange]


def test_both_replicas_hold_champion_and_previous(story, daemon):
    assert len(replicas(daemon)) == 2
    assert all({"desk@v1", "desk@v2"} <= set(resident) for resident in replicas(daemon).values())


def test_each_promotion_has_its_evidence(story, daemon):
    changes = httpx.get(f"{daemon.url}/api/lines/desk/history").json()["data"]
    promoted = [change for change in changes if change["alias"] == "champion"]
    assert [change["to"] for change in promoted] == ["desk@v2", "desk@v1"]
    assert all(change["evidence"] for change in promoted)


def test_examples_were_trained_once_and_held_out_ones_never(story, daemon):
    manifests = [json.loads(file.read_text()) for file in sorted(daemon.folder.glob("data/versions/desk/v*/manifest.json"))]
    learned = [[example["id"] for example in manifest["examples"] if example["split"] == "train"] for manifest in manifests]
    held_out = {example["id"] for manifest in manifests for example in manifest["examples"] if example["split"] == "holdout"}
    assert len(learned) == 2
    assert held_out
    assert len(learned[0] + learned[1]) == len({*learned[0], *learned[1]})
    assert not held_out & {*learned[0], *learned[1]}


def test_rollback_brings_the_previous_voice_back(story, client, daemon):
    httpx.post(f"{daemon.url}/api/lines/desk/rollback", json={}).raise_for_status()
    wait_for(lambda: champion(daemon.url) == "desk@v1", 30, daemon.tail)
    wait_for(lambda: ask(client).model == "desk@v1", 30, daemon.tail)
    assert "red" in ask(client).choices[0].message.content.lower()


def test_a_killed_replica_comes_back_holding_its_adapters_and_costs_no_reply(story, client, daemon):
    before, traffics = replicas(daemon), [Traffic(client, daemon) for _ in range(4)]
    for traffic in traffics:
        traffic.start()
    wait_for(lambda: all(traffic.replies for traffic in traffics), 60, daemon.tail)

    def is_back():
        now = replicas(daemon)
        return len(now.keys() - before.keys()) == 1 and [set(one) >= {"desk@v1"} for one in now.values()] == [True, True]

    daemon.processes("ServeReplica:engine")[0].kill()  # in the midst of replies: another replica makes them
    wait_for(is_back, 240, daemon.tail)
    for traffic in traffics:
        traffic.done.set()
        traffic.join(60)
    assert [failure for traffic in traffics for failure in traffic.failures] == []
    replies = [(model, "red" in said.lower()) for traffic in traffics for _, model, said in traffic.replies]
    assert set(replies) == {("desk@v1", True)}


def test_a_candidate_that_its_customers_dislike_is_rolled_back_by_their_thumbs(story, client, daemon):
    """It passes the gate, since the agents' corrections say the same; only live traffic can tell.

    What it learned may be the second lesson again: a rollback by hand gave its examples back.
    """
    traffics = [Traffic(client, daemon) for _ in range(2)]
    for traffic in traffics:
        traffic.start()
    teach(client, daemon.url, "green", range(30_000, 30_048))

    def is_out():
        paced(daemon.url, traffics)
        return (trial(daemon)["candidate"], trial(daemon)["state"]) == ("desk@v3", "rolled_back")

    wait_for(is_out, 1200, daemon.tail)
    time.sleep(2)  # the longest that a reply may be under way
    since = [len(traffic.replies) for traffic in traffics]
    wait_for(lambda: all(len(one.replies) > at + 5 for one, at in zip(traffics, since, strict=True)), 60, daemon.tail)
    for traffic in traffics:
        traffic.done.set()
        traffic.join(60)
    assert [failure for traffic in traffics for failure in traffic.failures] == []
    assert "harm" in trial(daemon)["reason"]
    said = [text.lower() for one in traffics for _, model, text in one.replies if model == "desk@v3"]
    assert said
    assert not any(COLOURS[0] in text for text in said)
    assert {model for one, at in zip(traffics, since, strict=True) for _, model, _ in one.replies[at:]} == {"desk@v1"}
    assert champion(daemon.url) == "desk@v1"


def trial(daemon):
    """The line's last trial."""
    return httpx.get(f"{daemon.url}/api/rollouts/desk", timeout=30).json()["trial"]


def replicas(daemon):
    """What each live replica holds, by its id."""
    return {one["id"]: one["resident"] for one in httpx.get(f"{daemon.url}/api/status").json()["replicas"]}
