import io
import json

import pytest
from rich.console import Console

from service.demo import report
from service.demo.outcome import Outcome
from service.demo.tally import Reply, Tally
from service.demo.texts import Text
from service.demo.watch import Evidence


def outcome(**changes) -> Outcome:
    tally = Tally()
    for second in range(60):
        model = ("smollm2-135m", "desk@v1", "desk@v2")[second // 20]
        for skill in ("airline", "headlines"):
            text = Text(skill, f"{skill} {second}", "positive")
            content = "positive" if model == "desk@v2" or (model == "desk@v1" and skill == "airline") else "eh"
            tally.add(Reply(f"r{second}", text, content, model, at=float(second)))
    history = [{"to": f"desk@v{n}", "at": 1000.0 + 20 * n, "swap_seconds": 0.25, "feedback_to_live_seconds": 9.0} for n in (1, 2)]
    evidence = [
        Evidence(at=15.0 + i, trial=f"t{i // 3}", units=(i, i), promote=i * 1.0, promote_at=3.0, rollback=-1.0, rollback_at=4.6)
        for i in range(6)
    ]
    given = {"promotions": history, "feedback_acknowledged": 7, "feedback_refused": [], "feedback_stored": 7}
    rest = {"examples_trained": 5, "seconds": 60.0, "began_at": 1000.0}
    return Outcome(**{"tally": tally, "evidence": evidence, **given, **rest, **changes})


def test_a_report_is_written_and_all_is_well(tmp_path):
    screen = io.StringIO()
    assert report.tell(outcome(), tmp_path, Console(file=screen, width=200)) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "<td>headlines</td>" in page
    assert "data:image/png;base64," in page
    assert "2 promotions in 60 s; 120 requests, 0 failed" in screen.getvalue()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feedback_stored": 6}, "7 pieces of feedback were acknowledged, 6 are stored"),
        ({"feedback_refused": ["feedback thumb-1: 400"]}, "1 pieces of feedback were refused: feedback thumb-1: 400"),
        ({"promotions": []}, "promoted were none, not v1 and v2"),
    ],
)
def test_a_broken_promise_is_told_and_fails(tmp_path, changes, said):
    screen = io.StringIO()
    assert report.tell(outcome(**changes), tmp_path, Console(file=screen, width=200)) == 1
    assert f"broken promise: {said}" in screen.getvalue()


def test_a_failed_request_breaks_a_promise(tmp_path):
    made = outcome()
    made.tally.fail("APIConnectionError: gone")
    screen = io.StringIO()
    assert report.tell(made, tmp_path, Console(file=screen, width=200)) == 1
    assert "1 requests failed, the first with: APIConnectionError: gone" in screen.getvalue()


def test_the_last_line_has_the_agreed_keys_in_their_order():
    said = json.loads(report.last_line(outcome()))
    assert list(said) == [
        "skills",
        "promotions",
        "requests",
        "failed_requests",
        "feedback_acknowledged",
        "feedback_stored",
        "examples_trained",
        "swap_seconds",
        "feedback_to_live_seconds",
        "seconds",
    ]
    assert said["skills"]["airline"]["v1"] == 1.0
    assert said["skills"]["headlines"] == {"base": 0.0, "v1": 0.0, "v2": 1.0}


def test_the_curve_leaves_out_taught_texts_and_the_base_asked_by_name():
    made = outcome()
    text = next(one for i in range(99) if not (one := Text("airline", f"extra {i}", "positive")).is_taught)
    times, means = report.curve(made, "airline", window=5)
    made.tally.add(Reply("x", text, "positive", "smollm2-135m", at=1.0, is_by_name=True))
    assert report.curve(made, "airline", window=5) == (times, means)
    assert means[0] == 0.0
    assert means[-1] == 1.0
