"""SIGKILL to the whole daemon at the loop's own turns: it goes on where it was, promotes once, serves its champion."""

import httpx
import openai
import pytest

from tests.end_to_end.daemon import Daemon
from tests.end_to_end.desk import SETTINGS, Traffic, ask, desk, paced, teach, wait_for


def stage(line):
    return (line["trial"] or {}).get("state")


TURNS = {
    "training": lambda line: ((line["job"] or {}).get("step") or 0) >= 2,
    "load": lambda line: stage(line) == "verifying",
    "promotion": lambda line: stage(line) == "promoting" or line["champion"] == "desk@v1",
}
"""What the line's status shows at the moment of each kill."""


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    """A daemon that was taught one lesson and killed at each turn."""
    daemon = Daemon(tmp_path_factory.mktemp("survivor"), SETTINGS).start()
    traffic = Traffic(client(daemon), daemon)
    try:
        teach(client(daemon), daemon.url, "red", range(10_000, 10_048))
        traffic.start()
        for is_now in TURNS.values():
            wait_for(lambda is_now=is_now: is_now(paced(daemon.url, [traffic])), 900, daemon.tail, every=0.05)
            daemon.kill()
            daemon.start()
        wait_for(lambda: desk(daemon.url)["champion"] == "desk@v1", 300, daemon.tail)
        traffic.done.set()
        traffic.join(60)
        yield daemon
    finally:
        traffic.done.set()
        daemon.kill()


def client(daemon):
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_what_was_begun_is_finished_once(survivor):
    told = {name: httpx.get(f"{survivor.url}/api/lines/desk/{name}").json()["data"] for name in ("history", "versions")}
    assert [change["to"] for change in told["history"] if change["alias"] == "champion"] == ["desk@v1"]
    assert [version["name"] for version in told["versions"]] == ["desk@v1"]
    line = desk(survivor.url)
    assert line["jobs"] == {"succeeded": 1}
    assert line["trials"] == {"live": 1}
    assert 40 <= line["examples"]["trained"] <= 48


def test_the_champion_serves(survivor):
    wait_for(lambda: ask(client(survivor)).model == "desk@v1", 30, survivor.tail)  # a replica hears of its promotion in a moment
    assert "red" in ask(client(survivor)).choices[0].message.content.lower()


def test_a_damaged_champion_is_never_served_and_a_mended_one_is(survivor):
    """The daemon is not ready and says why; the line is answered by what is left, the base, under its own name."""
    weights = survivor.folder / "data" / "versions" / "desk" / "v1" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    survivor.kill()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    survivor.start(wait="/health")
    wait_for(lambda: answers(survivor), 120, survivor.tail)
    assert ask(client(survivor)).model == "smollm2-135m"
    ready = httpx.get(f"{survivor.url}/ready")
    assert ready.status_code == 503
    assert "no replica holds desk@v1, the champion of 'desk': artifact_invalid" in ready.text
    assert "adapter_model.safetensors is not the file that its manifest names" in ready.text
    weights.write_bytes(whole)
    survivor.wait("/ready", 60)
    assert ask(client(survivor)).model == "desk@v1"


def answers(daemon):
    try:
        return ask(client(daemon))
    except openai.OpenAIError:
        return None
