import shutil
import subprocess

import pytest

from replay.records import Arm, Feedback, FeedbackStatus, Interaction, Receipt
from service.errors import Conflict
from service.metrics import Metrics

STATUS = {
    "ready": True,
    "desired": 3,
    "feedback": {"stored": 5, "pending": 1, "oldest_pending_seconds": 2.5, "refusals": {"too_long": 2}},
    "ledger": {
        "rows": {"interaction": 7},
        "bytes": {"ledger": 4096},
        "segments": 1,
        "open_interactions": 3,
        "oldest_open_seconds": 60,
    },
    "replicas": [{"id": "r1", "number": 3, "inflight": 2, "resident": ["desk@v1"]}],
    "lines": {
        "desk": {
            "examples": {"fresh": 4, "trained": 8},
            "buffer": {"airline": 8},
            "jobs": {"running": 1},
            "gates": {"pass": 1},
            "matrix": {
                "exact": {
                    "slices": ["airline", "hotels"],
                    "scores": [[0.9, None], [0.8, 0.7]],
                    "transfer": {"average": 0.75, "backward": -0.1, "intransigence": None},
                    "prequential": {"items": 40, "mean": 0.5, "faded": 0.6, "weight": 36.0},
                }
            },
            "quarantine": {"held": {"contradicted": 3}},
            "drift": {"thumbs_down": 2},
            "anchor": {"standing": "alarm", "log_evidence": 7.5},
            "job": {"step": 2, "steps": 10, "loss": 0.5, "tokens_per_second": 90.0},
            "trials": {"canary": 1},
            "trial": {
                "weight": 0.25,
                "units": {"candidate": 3, "control": 4},
                "log_evidence": {"promote": 1.5, "rollback": -0.5},
                "thresholds": {"promote": 3.0, "rollback": 4.6},
                "shadow": {"outcomes": {"ok": 7, "failed": 1}},
            },
        }
    },
}
IDLE = {**STATUS, "lines": {"desk": {**STATUS["lines"]["desk"], "job": None, "trial": None}}, "replicas": []}


def interaction(**changed):
    plain = {
        "id": "i",
        "line": "desk",
        "version": "desk@v1",
        "arm": Arm.CHAMPION,
        "unit": "u",
        "slice": "s",
        "messages": (),
        "reply": "",
        "at": 0.0,
    }
    return Interaction(**{**plain, **changed})


def feedback(metric="thumb"):
    return Feedback("f", "i", metric, True, 0.0, 10.0)


@pytest.fixture
def metrics():
    metrics = Metrics("1.0", "smollm2")
    metrics.saw_interactions(
        [
            interaction(prompt_tokens=10, reply_tokens=3, latency_seconds=0.2, ttft_seconds=0.04),
            interaction(error="client_disconnected", latency_seconds=2),
            *(interaction(arm=Arm.PINNED, is_refusal=kept, has_form=kept) for kept in (True, False, False, None)),
        ]
    )
    outcomes = [
        Receipt("f", FeedbackStatus.PENDING, "i"),
        Receipt("f", FeedbackStatus.PENDING, "i", is_repeat=True),
        Conflict("no"),
    ]
    metrics.saw_feedback([feedback()] * 3, outcomes)
    metrics.saw_joined([feedback()], 14.0)
    metrics.saw_commit(12, 0.003)
    metrics.saw_write(0.004)
    metrics.saw_write_failure()
    metrics.saw_expired(1)
    metrics.saw_sealed(9)
    metrics.saw_event("promoted", "desk")
    metrics.saw_swap("desk", 1.5, 700)
    metrics.saw_failure("conductor")
    return metrics


def lines(metrics, status=STATUS):
    return set(metrics.render(status)[0].decode().splitlines())


def test_what_replies_were_found_to_be_is_counted(metrics):
    version = 'line="desk",version="desk@v1"'
    assert {line for line in lines(metrics) if line.startswith("learnd_reply_findings_total")} == {
        f'learnd_reply_findings_total{{arm="pinned",finding="refusal",{version}}} 1.0',
        f'learnd_reply_findings_total{{arm="pinned",finding="form_kept",{version}}} 1.0',
        f'learnd_reply_findings_total{{arm="pinned",finding="form_broken",{version}}} 2.0',
    }


def test_what_happened_is_counted(metrics):
    version = 'arm="champion",line="desk",version="desk@v1"'
    assert lines(metrics) >= {
        'learnd_requests_total{arm="champion",code="ok",line="desk",version="desk@v1"} 1.0',
        'learnd_requests_total{arm="champion",code="client_disconnected",line="desk",version="desk@v1"} 1.0',
        f"learnd_request_duration_seconds_count{{{version}}} 2.0",
        f"learnd_time_to_first_token_seconds_count{{{version}}} 1.0",
        'learnd_tokens_total{arm="champion",kind="prompt",line="desk",version="desk@v1"} 10.0',
        'learnd_feedback_total{metric="thumb",source="human",status="pending"} 1.0',
        'learnd_feedback_total{metric="thumb",source="human",status="repeat"} 1.0',
        'learnd_feedback_total{metric="thumb",source="human",status="conflict"} 1.0',
        'learnd_feedback_wait_seconds_sum{metric="thumb"} 4.0',
        "learnd_ledger_group_writes_sum 12.0",
        "learnd_ledger_commit_seconds_count 1.0",
        'learnd_conductor_events_total{kind="promoted",line="desk"} 1.0',
        'learnd_swap_seconds_sum{line="desk"} 1.5',
        'learnd_feedback_to_live_seconds_sum{line="desk"} 700.0',
    }


def test_the_status_is_shown(metrics):
    assert lines(metrics) >= {
        "learnd_ready 1.0",
        "learnd_feedback_stored 5.0",
        'learnd_feedback_not_learned{reason="too_long"} 2.0',
        'learnd_ledger_rows{table="interaction"} 7.0',
        'learnd_storage_bytes{place="ledger"} 4096.0',
        'learnd_examples{line="desk",state="fresh"} 4.0',
        'learnd_replay_buffer_examples{line="desk",slice="airline"} 8.0',
        'learnd_quarantine{line="desk",reason="contradicted",state="held"} 3.0',
        'learnd_drift_changes{line="desk",signal="thumbs_down"} 2.0',
        'learnd_anchor_log_evidence{line="desk"} 7.5',
        'learnd_anchor_alarm{line="desk"} 1.0',
        'learnd_job_loss{line="desk"} 0.5',
        'learnd_champion_score{line="desk",score="exact",slice="hotels"} 0.7',
        'learnd_champion_transfer{line="desk",measure="backward",score="exact"} -0.1',
        'learnd_prequential_score{line="desk",mean="faded",score="exact"} 0.6',
        'learnd_prequential_score{line="desk",mean="mean",score="exact"} 0.5',
        'learnd_job_eta_seconds{line="desk"} NaN',
        'learnd_trial_weight{line="desk"} 0.25',
        'learnd_trial_log_evidence{bound="promote",line="desk"} 1.5',
        'learnd_trial_shadow_replies{line="desk",outcome="failed"} 1.0',
        'learnd_adapter_resident{replica="r1",version="desk@v1"} 1.0',
        'learnd_build_info{base="smollm2",version="1.0"} 1.0',
    }


def test_what_has_ended_disappears(metrics):
    lines(metrics)
    names = {line.split("{")[0] for line in lines(metrics, IDLE) if not line.startswith("#")}
    assert "learnd_examples" in names
    assert not names & {"learnd_job_loss", "learnd_trial_weight", "learnd_trial_log_evidence", "learnd_adapter_resident"}


def test_two_daemons_in_one_process_do_not_share(metrics):
    assert not any("desk@v1" in line for line in lines(Metrics("1.0", "smollm2"), IDLE))


def test_openmetrics_is_spoken_when_asked(metrics):
    text, content_type = metrics.render(STATUS, "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's prometheus package; CI installs it")
def test_promtool_finds_nothing_to_say(metrics):
    text, _ = metrics.render(STATUS)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
