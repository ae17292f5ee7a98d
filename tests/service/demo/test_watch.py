import asyncio

import httpx
import pytest

from service.demo.watch import Watch, news, trouble

WELL = {"champion": None, "job": {"id": "j1", "state": "running"}, "trial": None, "last_verdict": None}


def test_all_is_well():
    assert trouble(WELL) is None
    assert trouble({"last_verdict": {"outcome": "pass"}, "trial": {"id": "t", "state": "canary"}}) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"job": {"id": "j1", "state": "failed", "reason": "died 3 times"}}, "job j1 failed: died 3 times"),
        ({"trial": {"id": "t1", "state": "expired", "reason": "max_seconds"}}, "trial t1 expired: max_seconds"),
        ({"last_verdict": {"outcome": "inconclusive", "reasons": ["7 items", "noise"]}}, "inconclusive: 7 items; noise"),
    ],
)
def test_trouble_is_told_with_its_reason(line, said):
    assert said in trouble(line)


def test_news_are_what_changed():
    fresh = {"champion": None, "examples": {"fresh": 220}, "job": None, "trial": None, "last_verdict": None}
    training = {**fresh, "job": {"id": "j1"}}
    judged = {**fresh, "last_verdict": {"outcome": "pass", "reasons": ["gain 0.7"]}}
    tried = {**judged, "candidate": "desk@v1", "trial": {"id": "t1", "state": "canary"}}
    promoted = {**judged, "champion": "desk@v1"}
    assert news(fresh, fresh) == []
    assert news(fresh, training) == ["220 new examples are enough: job j1 trains"]
    assert news(training, judged) == ["the gate says pass: gain 0.7"]
    assert news(judged, tried) == ["desk@v1 is on trial"]
    assert news(tried, promoted) == ["desk@v1 is promoted: it answers from now on"]


def test_the_look_that_ended_a_trial_is_kept():
    """The open trial shows no evidence over its threshold: at that moment it is promoted and gone from the status."""
    units, limits = {"candidate": 9, "control": 9}, {"promote": 3.0, "rollback": 4.6}
    open_trial = {
        "id": "t1",
        "state": "canary",
        "units": units,
        "thresholds": limits,
        "log_evidence": {"promote": 2.5, "rollback": -1.0},
    }
    ended = {
        **open_trial,
        "state": "promoted",
        "units": {**units, "candidate": 10},
        "log_evidence": {"promote": 3.1, "rollback": -1.0},
    }
    lines = iter([{"trial": open_trial}, {"trial": None}])

    def daemon(request):
        said = ended if request.url.path == "/api/trials/t1" else {"ready": True, "lines": {"desk": next(lines)}}
        return httpx.Response(200, json=said)

    async def two_looks():
        async with httpx.AsyncClient(transport=httpx.MockTransport(daemon), base_url="http://daemon") as http:
            watch = Watch(http, clock=lambda: 0.0, is_alive=lambda: True)
            await watch.look()
            await watch.look()
            return [look.promote for look in watch.evidence]

    assert asyncio.run(two_looks()) == [2.5, 3.1]
