from service.replicas import Replicas
from service.rollout.probe import ProbeResult
from service.router import ReplicaReport


def report(name="a", number=1, inflight=None, **resident):
    return ReplicaReport(
        name, number, {k: ProbeResult(v, None if v else "load_failed") for k, v in resident.items()}, inflight or {}
    )


def test_a_report_is_news_when_it_differs_in_more_than_traffic():
    replicas = Replicas(forget_seconds=10)
    assert replicas.saw(report(v1=True), 0)
    assert not replicas.saw(report(v1=True, inflight={"v1": 3}), 1)
    assert replicas.saw(report(v1=False), 2)
    assert replicas.saw(report(number=2, v1=False), 3)
    assert replicas.saw(report("b"), 4)


def test_who_is_silent_is_forgotten():
    replicas = Replicas(forget_seconds=10)
    replicas.saw(report("b"), 0)
    replicas.saw(report("a"), 5)
    assert [seen.report.replica for seen in replicas.live(10)] == ["a", "b"]
    assert [seen.report.replica for seen in replicas.live(12)] == ["a"]
    assert replicas.saw(report("b"), 13)


def test_only_what_is_proven_counts_as_resident():
    replicas = Replicas(forget_seconds=10)
    replicas.saw(report(number=4, inflight={"v1": 2, "v2": 1}, v1=True, v2=False), 7)
    (seen,) = replicas.live(8)
    assert seen.as_json() == {
        "id": "a",
        "number": 4,
        "resident": ["v1"],
        "refused": {"v2": "load_failed"},
        "inflight": 3,
        "last_seen": 7,
    }
