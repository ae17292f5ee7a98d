"""The loop from demonstrations to a champion, on a real database with a fake launcher and fake replicas."""

import json

import numpy as np
import pytest
import structlog

from replay import ledger, opinions
from replay.records import Arm
from service import audit, jobs, registry, status, transitions
from service.errors import Conflict, NotFound, StorageFailed
from service.rollout import trials
from service.rollout.controller import Move
from service.rollout.stages import Stage
from tests.service.world import LINE, QUICK, World, write_outcome


@pytest.fixture(autouse=True)
def _plain_logs():
    """Tracebacks as the daemon prints them; structlog's default draws each with all its locals, which takes seconds."""
    renderers = [structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer(key_order=["event"])]
    structlog.configure(processors=renderers, logger_factory=structlog.PrintLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def make(tmp_path):
    worlds = []

    def made(settings=None, **fields):
        worlds.append(World(tmp_path, settings, **fields))
        return worlds[-1]

    yield made
    for world in worlds:
        world.writer.close()


@pytest.fixture
def world(make):
    world = make()
    world.quality = {"desk@v1": 0.8, "desk@v2": 0.95}
    return world


def rules(**fields):
    """The quick settings with other rules of rollout."""
    line = QUICK["lines"][LINE]
    return {"lines": {LINE: {**line, "rollout": {**line["rollout"], **fields}}}}


def promoted(world, version="desk@v1", customers=10):
    world.until(lambda w: w.champion == version, customers=customers)
    world.until(lambda w: w.kinds()[-1] == "swapped")


def ended(world, version="desk@v1", **options):
    world.until(lambda w: w.trial is not None and w.trial.candidate == version and not w.trial.stage.is_open, **options)
    return world.trial


class TestFromFeedbackToChampion:
    def test_the_whole_way(self, world):
        world.demonstrate(40)
        promoted(world)
        assert world.kinds() == ["job_queued", "job_started", "version_made", "trial_moved", "trial_moved", "promoted", "swapped"]
        assert world.examples == {"trained": 40}
        change = world.read(lambda conn: registry.last_crowning(conn, LINE))
        assert change.evidence["log_promote"] >= change.evidence["promote_at"]
        assert change.evidence["promote_at"] == pytest.approx(np.log(22.857657))
        assert (world.trial.fdr_index, world.trial.has_passed) == (1, True)
        assert change.feedback_to_live_seconds > 0
        assert change.swap_seconds is not None
        (version,) = world.read(lambda conn: registry.versions(conn, LINE))
        assert (version.state, version.gate["outcome"], version.scores["new"]["n"]) == ("live", "pass", 60)
        assert (world.folder / "versions" / "desk" / "v1" / "COMPLETE").exists()

    def test_what_a_job_warns_of_is_logged_and_kept_with_its_verdict(self, world):
        world.outcome["warnings"] = ["ewc_faint: changed nothing"]
        world.demonstrate(40)
        with structlog.testing.capture_logs() as logged:
            promoted(world)
        (version,) = world.read(lambda conn: registry.versions(conn, LINE))
        assert version.gate["warnings"] == ["ewc_faint: changed nothing"]
        assert [one["warnings"] for one in logged if one["event"] == "version_made"] == [["ewc_faint: changed nothing"]]
        world.outcome["champion"] = 0.8
        world.demonstrate(40)
        with structlog.testing.capture_logs() as logged:
            world.until(lambda w: w.job.state is jobs.State.REJECTED)
        assert [one["warnings"] for one in logged if one["event"] == "job_ended"] == [["ewc_faint: changed nothing"]]

    def test_the_second_starts_from_the_first_and_rehearses_it(self, world):
        world.demonstrate(40)
        promoted(world)
        world.outcome |= {"champion": 0.0, "candidate": 0.8, "older": {"new (older)": (0.8, 0.8)}}
        world.demonstrate(40, slice="second")
        promoted(world, "desk@v2")
        assert world.read(lambda conn: registry.aliases(conn, LINE)) == {"champion": "desk@v2", "previous": "desk@v1"}
        spec = (world.folder / "jobs" / "desk-job2" / "spec.json").read_text()
        assert str(world.folder / "versions" / "desk" / "v1") in spec
        plan = (world.folder / "jobs" / "desk-job2" / "examples.jsonl").read_text()
        assert '"source": "remembered"' in plan
        older = [json.loads(row) for row in (world.folder / "jobs" / "desk-job2" / "older.jsonl").read_text().splitlines()]
        assert {row["split"] for row in older} == {"holdout", "validation"}
        assert {row["slice"] for row in older} == {"new"}
        world.demonstrate(40, slice="second")
        world.until(lambda w: w.job.id == "desk-job3" and w.job.state is jobs.State.RUNNING)
        older = [json.loads(row) for row in (world.folder / "jobs" / "desk-job3" / "older.jsonl").read_text().splitlines()]
        by_split = {split: {row["slice"] for row in older if row["split"] == split} for split in ("holdout", "validation")}
        assert by_split == {"holdout": {"new", "second"}, "validation": {"new"}}, (
            "what a slice says now may contradict what it said"
        )
        assert [v.state for v in world.read(lambda conn: registry.versions(conn, LINE))] == ["live", "retired"]
        assert world.conductor.remembered(LINE).keys() == {"new", "second"}

    @pytest.mark.parametrize(("late", "chooses"), [(4, True), (5, False)])
    def test_a_few_late_examples_of_a_slice_do_not_silence_its_older_ones(self, world, late, chooses):
        """A tenth of the fresh examples is what a job teaches; with fewer, nothing else would tell that the slice is forgotten."""
        world.demonstrate(40)
        promoted(world)
        world.demonstrate(45 - late, slice="second")
        world.demonstrate(late)
        world.until(lambda w: w.job.id == "desk-job2" and w.job.state is jobs.State.RUNNING)
        older = [json.loads(row) for row in (world.folder / "jobs" / "desk-job2" / "older.jsonl").read_text().splitlines()]
        assert any(row["split"] == "validation" and row["slice"] == "new" for row in older) is chooses

    def test_a_job_is_told_what_the_line_will_remember_if_it_is_promoted_and_nothing_erased(self, world):
        world.demonstrate(40)
        promoted(world)
        learned = world.read(lambda conn: ledger.trained(conn, LINE))
        gone = learned[0]
        world.writer.submit(lambda conn: ledger.forget(conn, world.folder, [gone.interaction_id])).result()
        world.demonstrate(40, slice="second")
        world.until(lambda w: w.job.id == "desk-job2" and w.job.state is jobs.State.RUNNING)
        folder = world.folder / "jobs" / "desk-job2"
        plan = map(json.loads, (folder / "examples.jsonl").read_text().splitlines())
        fresh = {row["id"] for row in plan if (row["source"], row["split"]) == ("fresh", "train")}
        kept = json.loads((folder / "spec.json").read_text())["kept"]
        assert set(kept) == {e.id for e in learned} - {gone.id} | fresh

    def test_opinions_go_with_the_job_and_are_consumed_or_given_back_with_its_examples(self, make):
        chosen = {"thumbs": ["thumb"], "corrections": True, "min_items": 20, "min_minority": 5}
        world = make({"lines": {LINE: {**QUICK["lines"][LINE], "learning": {"preferences": chosen}}}})
        waiting = lambda: world.read(lambda conn: opinions.counts(conn, LINE, world.settings.wanted(LINE)))  # noqa: E731
        world.demonstrate(40)
        world.launcher.outcome = {"candidate": 0.0}
        world.until(lambda w: w.job is not None and w.job.ended_at is not None)
        assert waiting() == {"up": 0, "down": 0, "pairs": 0}, "what is fresh again is a pair for the next job"
        world.quality, world.launcher.outcome = {"desk@v1": 0.9}, {"candidate": 0.8}
        world.demonstrate(40)
        promoted(world)
        said = (world.folder / "jobs" / "desk-job2" / "opinions.jsonl").read_text().splitlines()
        first = json.loads(said[0])
        assert len(said) == 80
        assert (first["good"], first["bad"]) == (f"label of {first['id'][2:]}", "an answer")
        queued = [event.body["opinions"] for event in world.events if event.kind == "job_queued"]
        assert queued == [{"correction": 40}, {"correction": 80}]
        assert waiting() == {"up": 0, "down": 0, "pairs": 0, "trained": 80}

    def test_each_version_keeps_the_matrix_of_those_before_it(self, world):
        world.demonstrate(40)
        promoted(world)
        world.launcher.outcome = {"champion": 0.8, "candidate": 0.9, "older": {"old": (0.8, 0.75)}}
        world.demonstrate(40)
        promoted(world, "desk@v2")
        first, second = (v.gate["matrix"]["exact"] for v in reversed(world.read(lambda conn: registry.versions(conn, LINE))))
        assert (first["versions"], first["slices"], first["scores"]) == (["desk@v1"], ["new"], [[pytest.approx(0.8)]])
        assert (second["versions"], second["slices"]) == (["desk@v1", "desk@v2"], ["new", "old"])
        assert second["scores"][1] == [pytest.approx(0.9), pytest.approx(0.75)]
        assert second["transfer"]["backward"] == pytest.approx(0.1)

    def test_each_version_keeps_how_new_examples_were_answered_before_they_were_learned(self, world):
        world.demonstrate(40)
        promoted(world)
        world.launcher.outcome = {"champion": 0.2, "candidate": 0.0}
        world.demonstrate(40)
        world.until(lambda w: w.job.id == "desk-job2" and w.job.ended_at is not None)
        world.launcher.outcome = {"champion": 0.2, "candidate": 0.9}
        world.demonstrate(40)
        promoted(world, "desk@v2")
        first, second = (v.gate["matrix"]["exact"] for v in reversed(world.read(lambda conn: registry.versions(conn, LINE))))
        assert (first["prequential"]["items"], first["prequential"]["mean"]) == (60, 0)
        assert (second["prequential"]["items"], second["prequential"]["mean"]) == (120, pytest.approx(0.1)), (
            "the failed job's once"
        )

    def test_a_golden_suite_goes_with_the_job_and_each_verdict_counts_a_look(self, make, tmp_path):
        row = {"messages": [{"role": "user", "content": "Where is my bag?"}], "reply": "On its way.", "must_pass": True}
        file = tmp_path / "core.ndjson"
        file.write_text(json.dumps(row))
        world = make({"lines": {LINE: {**QUICK["lines"][LINE], "suites": {"core": file}}}})
        for looks in (1, 2):
            world.demonstrate(40)
            world.launcher.outcome = {"candidate": 0.0, "suites": {"core": 1.0}}
            world.until(lambda w, n=looks: w.job is not None and w.job.id.endswith(f"job{n}") and w.job.ended_at is not None)
            folder = world.folder / "jobs" / world.job.id
            (golden,) = map(json.loads, (folder / "suites.jsonl").read_text().splitlines())
            assert golden == {"suite": "core", "id": "1", **row}
            spec = json.loads((folder / "spec.json").read_text())
            assert spec["looks"] == {"suite:core": looks, "new": looks}
            assert set(spec["suites"]) == {"core"}
            assert world.job.verdict["measured"] == ["suite:core"]

    def test_a_suite_that_is_broken_later_fails_the_job_with_its_reason(self, make, tmp_path):
        file = tmp_path / "core.ndjson"
        file.write_text("{half")
        world = make({"lines": {LINE: {**QUICK["lines"][LINE], "suites": {"core": file}}}})
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and w.job.ended_at is not None)
        assert world.job.state is jobs.State.FAILED
        assert "core.ndjson:1" in world.job.reason
        assert world.examples == {"fresh": 40}

    def test_the_customers_meet_the_candidate_only_while_it_is_on_trial(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None)
        assert world.trial.stage is Stage.VERIFYING
        assert {world.ask().version for _ in range(9)} == {"base"}
        world.until(lambda w: w.trial.stage is Stage.CANARY)
        assert {world.ask().version for _ in range(20)} == {"base", "desk@v1"}

    def test_a_worse_candidate_is_rolled_back_and_leaves_everything_as_it_was(self, world):
        world.demonstrate(40)
        promoted(world)
        before = {**world.summary(), "trials": None, "jobs": None, "versions": None}
        world.quality["desk@v2"] = 0.0
        world.outcome["champion"] = 0.0
        world.demonstrate(40)
        trial = ended(world, "desk@v2", customers=10)
        assert (trial.stage, trial.reason.split(":")[0]) == (Stage.ROLLED_BACK, "harmed")
        after = {**world.summary(), "trials": None, "jobs": None, "versions": None}
        assert after == {**before, "examples": {LINE: {"trained": 40, "fresh": 40}}}
        assert world.conductor.remembered(LINE) == {"new": sum(world.conductor.remembered(LINE).values())}
        assert "desk@v2" not in world.conductor.desired().resident_names

    def test_the_same_examples_are_not_tried_again_until_enough_new_ones_came(self, world):
        world.quality["desk@v1"] = 0.0
        world.outcome["candidate"] = 0.0
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and not w.job.is_open)
        assert world.job.state is jobs.State.REJECTED
        assert world.job.verdict["outcome"] == "fail"
        world.demonstrate(39)
        assert [world.step() for _ in range(5)] == [[]] * 5
        world.demonstrate(1)
        world.step()
        assert (world.job.id, world.job.examples) == ("desk-job2", 80)

    def test_a_burst_of_errors_rolls_back_at_once(self, world):
        world.failing = {"desk@v1"}
        world.demonstrate(40)
        assert ended(world, customers=4).reason.startswith("error_burst")

    def test_an_engine_that_dies_under_its_first_reply_rolls_back_at_once(self, world):
        world.failing, world.failure = {"desk@v1"}, "engine_dead"
        world.demonstrate(40)
        last = ended(world, customers=1)
        assert (last.stage, last.reason) == (Stage.ROLLED_BACK, "engine_crash: the engine died under 1 of its replies")

    @pytest.mark.parametrize("kind", ["refusal", "error"])
    def test_a_candidate_that_refuses_is_rolled_back_where_a_guardrail_listens(self, make, kind):
        world = make(rules(guardrails={"it": {"kind": kind, "margin": 0.1}}))
        world.quality, world.refusing = {"desk@v1": 0.95}, {"desk@v1"}
        world.demonstrate(40)
        last = ended(world, customers=10)
        assert last.reason.startswith("harmed_it" if kind == "refusal" else "non_inferior")

    def test_a_trial_that_loses_units_of_one_arm_is_held_and_never_promoted(self, make):
        world = make(rules(min_units=100))
        world.quality = {"desk@v1": 0.8}
        world.demonstrate(40)
        store = world._store
        world._store = lambda asked, said: store(
            kept := [one for one in asked if one.arm is not Arm.CONTROL or world.random.random() < 0.4],
            [one for one in said if one.inference_id in {i.id for i in kept}],
        )
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.HOLD, customers=20)
        assert world.trial.reason.startswith("sample_ratio_mismatch")
        assert ended(world, steps=60, customers=20, seconds=20).stage is Stage.EXPIRED
        assert world.champion is None

    def test_after_each_setback_in_a_row_the_next_job_waits_twice_as_long(self, make):
        world = make({"lines": {LINE: {**QUICK["lines"][LINE], "trigger": {"min_examples": 40, "cooldown_seconds": 20}}}})
        world.outcome["candidate"] = 0.0  # the gate rejects it
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and not w.job.is_open)
        first = world.job.ended_at
        world.outcome["candidate"], world.refused = 0.8, {"desk@v1": "noop_adapter"}
        world.demonstrate(40)
        world.until(lambda w: w.job.id == "desk-job2")
        assert world.job.created_at - first == 40
        second = ended(world).ended_at
        world.demonstrate(40)
        world.crash()
        world.until(lambda w: w.job.id == "desk-job3")
        assert world.job.created_at - second == 80

    def test_an_index_that_expired_is_used_up_even_over_a_crash(self, world):
        world.demonstrate(40)
        assert ended(world, steps=60, seconds=20).fdr_index == 1
        world.crash()
        world.demonstrate(40)
        promoted(world, "desk@v2")
        change = world.read(lambda conn: registry.last_crowning(conn, LINE))
        assert world.trial.fdr_index == 2
        assert change.evidence["promote_at"] == pytest.approx(np.log(69.291458))

    def test_out_of_time_the_champion_stays(self, world):
        world.demonstrate(40)
        assert ended(world, steps=60, seconds=20).stage is Stage.EXPIRED
        assert world.champion is None
        assert world.examples == {"fresh": 40}

    def test_a_candidate_that_replicas_refuse_never_meets_traffic(self, world):
        world.refused = {"desk@v1": "fingerprint_mismatch"}
        world.demonstrate(40)
        trial = ended(world, customers=5)
        assert (trial.stage, trial.steps) == (Stage.REJECTED, ())
        assert trial.reason.startswith("fingerprint_mismatch")


class TestJobs:
    def test_a_death_is_retried_and_counted(self, world):
        world.launcher.dies = ["out of memory"]
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None)
        assert world.launcher.started == ["desk-job1"] * 2
        assert world.job.attempts == 1

    def test_too_many_deaths_fail_it_and_free_its_examples(self, world):
        world.launcher.dies = ["out of memory"] * 3
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and not w.job.is_open)
        assert (world.job.state, world.job.reason) == (jobs.State.FAILED, "out of memory")
        assert world.examples == {"fresh": 40}

    @pytest.mark.parametrize("said", ["{}", "{", '{"slices": {"new": {"is_new": true, "ids": [], "base": {}}}}'])
    def test_what_cannot_be_judged_is_rejected(self, world, said):
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and w.job.state is jobs.State.RUNNING)
        folder = world.folder / "jobs" / "desk-job1"
        write_outcome(folder)
        (folder / "evaluation.json").write_text(said)
        world.crash()
        world.until(lambda w: not w.job.is_open)
        assert (world.job.state, world.job.reason.split(":")[0]) == (jobs.State.REJECTED, "artifact_invalid")
        assert world.examples == {"fresh": 40}

    def test_too_few_held_out_examples_are_no_pass(self, world):
        world.outcome["items"] = 4
        world.demonstrate(40)
        world.until(lambda w: w.job is not None and not w.job.is_open)
        assert (world.job.state, world.job.verdict["outcome"]) == (jobs.State.REJECTED, "inconclusive")
        (again,) = world.read(lambda conn: status.replay(conn, "desk-job1"))
        assert (again["recorded"], again["is_same"]) == (world.job.reason, True)
        assert world.read(audit.verify).broken is None

    def test_by_hand_it_needs_something_new(self, world):
        with pytest.raises(Conflict, match="nothing new"):
            world.conductor.train(LINE)
        world.demonstrate(8)
        job = world.conductor.train(LINE)
        assert (job.trigger, job.examples) == ("operator", 8)
        with pytest.raises(Conflict, match="one at a time"):
            world.conductor.train(LINE)

    def test_not_while_a_trial_runs(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None)
        world.demonstrate(40)
        world.step()
        assert world.job.id == "desk-job1"
        with pytest.raises(Conflict, match="its end comes first"):
            world.conductor.train(LINE)


class TestByHand:
    def test_a_candidate_is_promoted_before_its_evidence(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        assert world.conductor.promote(LINE).stage is Stage.PROMOTING
        promoted(world, customers=0)
        assert world.examples == {"trained": 40}
        assert (world.trial.stage, world.trial.has_passed) == (Stage.LIVE, False)
        assert world.read(lambda conn: trials.promotions(conn, LINE)) == 0

    def test_one_that_must_wait_waits(self, make):
        world = make(rules(is_automatic=False))
        world.quality = {"desk@v1": 0.8}
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.WAITING, customers=10)
        assert world.step(customers=10) == [] or world.trial.stage is Stage.WAITING
        world.conductor.promote(LINE)
        promoted(world)
        assert world.read(lambda conn: trials.promotions(conn, LINE)) == 1

    def test_a_pause_holds_and_a_resume_goes_on_to_the_end(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        assert world.conductor.steer(LINE, "pause").stage is Stage.HOLD
        for _ in range(20):
            world.step(customers=10)
        held = world.trial.id
        look = world.read(lambda conn: trials.last_look(conn, held))
        assert look.log_promote >= look.promote_at
        assert world.trial.stage is Stage.HOLD  # proven, and still held
        assert "desk@v1" in {world.ask().version for _ in range(9)}
        world.crash()
        world.step()
        assert world.trial.stage is Stage.HOLD
        resumed = world.conductor.steer(LINE, "resume")
        assert (resumed.stage, resumed.step, resumed.weight, resumed.fdr_index) == (Stage.CANARY, 0, 0.5, 1)
        promoted(world)

    def test_a_held_candidate_that_harms_is_rolled_back(self, world):
        world.failing = {"desk@v1"}
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        world.conductor.steer(LINE, "pause")
        assert ended(world, customers=4).reason.startswith("error_burst")

    def test_abort_beats_promote_until_the_alias_has_moved(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        world.conductor.promote(LINE)
        promoting = world.trial
        assert world.conductor.steer(LINE, "abort").stage is Stage.ROLLING_BACK
        with pytest.raises(Conflict, match="rolling_back to promoting"):
            world.conductor.promote(LINE)
        move = Move(Stage.LIVE, "what a tick had decided before")
        with pytest.raises(Conflict, match="not promoting any more"):
            world.read(lambda conn: transitions.advance(conn, promoting, move, world.now))
        assert ended(world).reason == "operator: abort"
        assert world.champion is None
        assert world.examples == {"fresh": 40}

    def test_an_abort_before_traffic_and_one_without_a_trial(self, world):
        with pytest.raises(Conflict, match="no trial to abort"):
            world.conductor.steer(LINE, "abort")
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None)
        assert world.conductor.steer(LINE, "abort").stage is Stage.ABORTED
        with pytest.raises(NotFound):
            world.conductor.steer("nope", "abort")

    def test_only_a_canary_is_paused_and_only_what_is_held_resumed(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None)
        with pytest.raises(Conflict, match="verifying to hold"):
            world.conductor.steer(LINE, "pause")
        world.until(lambda w: w.trial.stage is Stage.CANARY)
        with pytest.raises(Conflict, match="not on hold"):
            world.conductor.steer(LINE, "resume")

    def test_a_rollback_ends_the_trial_first(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        assert world.conductor.roll_back(LINE)["stage"] == "rolling_back"
        assert "desk@v1" not in {world.ask().version for _ in range(9)}
        assert ended(world).stage is Stage.ROLLED_BACK
        assert world.examples == {"fresh": 40}

    def test_then_the_champion_goes_back_to_the_previous_and_to_the_base(self, world):
        world.demonstrate(40)
        promoted(world)
        world.demonstrate(40, slice="second")
        promoted(world, "desk@v2")
        assert world.conductor.roll_back(LINE)["to"] == "desk@v1"
        assert world.champion == "desk@v1"
        assert world.conductor.roll_back(LINE)["to"] is None
        with pytest.raises(Conflict, match="served by the base"):
            world.conductor.roll_back(LINE)
        states = {v.name: v.state for v in world.read(lambda conn: registry.versions(conn, LINE))}
        assert states == {"desk@v1": "rolled_back", "desk@v2": "rolled_back"}

    def test_after_a_rollback_a_job_reads_the_folder_of_the_version_that_is_champion_again(self, world):
        """Weights, anchor and Fisher of the next job are in the parent's folder: nothing of what was taken back is."""
        world.demonstrate(40)
        promoted(world)
        world.demonstrate(40, slice="second")
        promoted(world, "desk@v2")
        world.conductor.roll_back(LINE)
        world.demonstrate(40, slice="third")
        world.until(lambda w: w.job.id == "desk-job3" and w.job.state is jobs.State.RUNNING)
        spec = json.loads((world.folder / "jobs" / "desk-job3" / "spec.json").read_text())
        assert spec["parent"] == str(world.folder / "versions" / "desk" / "v1")

    def test_an_old_version_is_proven_before_it_answers(self, world):
        world.demonstrate(40)
        promoted(world)
        world.conductor.roll_back(LINE)
        trial = world.conductor.promote(LINE, "desk@v1")
        assert (trial.stage, trial.is_operator, world.champion) == (Stage.VERIFYING, True, None)
        promoted(world, customers=0)
        assert world.champion == "desk@v1"
        assert world.examples == {"trained": 40}

    def test_a_version_summoned_beside_a_running_job_is_promoted_and_the_job_ends(self, world):
        """An emergency: the line must not wait for a job, nor the job for ever on a trial."""
        world.demonstrate(40)
        promoted(world)
        world.conductor.roll_back(LINE)
        world.demonstrate(40)
        world.until(lambda w: w.job.id == "desk-job2" and w.job.state is jobs.State.RUNNING)
        world.conductor.promote(LINE, "desk@v1")
        world.until(lambda w: w.champion == "desk@v1" and not w.job.is_open)
        assert world.job.reason.startswith("champion_changed")
        assert "failed" not in world.kinds()

    def test_examples_of_an_expired_version_are_learned_when_it_is_promoted_after_all(self, world):
        world.demonstrate(40)
        assert ended(world, steps=60, seconds=20).stage is Stage.EXPIRED
        world.demonstrate(3)
        world.conductor.promote(LINE, "desk@v1")
        promoted(world, customers=0)
        assert world.examples == {"trained": 40, "fresh": 3}

    def test_a_champion_changed_by_hand_ends_a_running_trial_and_a_running_job(self, world):
        world.demonstrate(40)
        promoted(world)
        world.demonstrate(40)
        world.until(lambda w: w.job.id == "desk-job2" and w.job.state is jobs.State.RUNNING)
        world.conductor.roll_back(LINE)
        world.until(lambda w: not w.job.is_open)
        assert world.job.reason.startswith("champion_changed")

    @pytest.mark.parametrize(
        ("line", "version", "error"), [("nope", None, NotFound), (LINE, "desk@v9", NotFound), (LINE, None, Conflict)]
    )
    def test_what_does_not_exist_is_said(self, world, line, version, error):
        with pytest.raises(error, match=version or line):
            world.conductor.promote(line, version)

    def test_the_champion_is_not_promoted_again(self, world):
        world.demonstrate(40)
        promoted(world)
        with pytest.raises(Conflict, match="champion already"):
            world.conductor.promote(LINE, "desk@v1")


class TestFailures:
    def test_a_launcher_that_fails_is_logged_counted_and_asked_again(self, world, capsys):
        start, calls = world.launcher.start, []

        def broken(job, folder):
            calls.append(job)
            if len(calls) < 3:
                raise OSError("no space left on device")
            start(job, folder)

        world.launcher.start = broken
        world.demonstrate(40)
        promoted(world)
        assert world.conductor.failures[LINE] == 2
        assert world.kinds().count("failed") == 2
        said = capsys.readouterr().out
        assert "conductor_failed" in said
        assert "no space left on device" in said

    def test_a_full_disk_stops_nothing_for_ever(self, world):
        world.demonstrate(40)
        (world.folder / "jobs").write_text("in the way of a folder")
        world.step(), world.step(), world.step()
        assert world.conductor.failures[LINE] == 2
        assert world.job.state is jobs.State.QUEUED
        (world.folder / "jobs").unlink()
        promoted(world)

    def test_one_line_that_fails_does_not_stop_the_others(self, make):
        world = make({"lines": {"broken": QUICK["lines"][LINE], LINE: QUICK["lines"][LINE]}, "base": {"max_resident": 6}})
        world.quality = {"desk@v1": 0.8}
        asked = world.conductor._line
        world.conductor._line = lambda line: asked(line) if line == LINE else {}[line]
        world.demonstrate(40)
        world.until(lambda w: w.champion == "desk@v1", customers=10)
        assert world.conductor.failures["broken"] > 5

    def test_a_closed_ledger_is_a_storage_failure(self, world):
        world.writer.close()
        with pytest.raises(StorageFailed):
            world.conductor.train(LINE)
        world.open()

    def test_of_two_decisions_on_one_trial_one_holds(self, world):
        """A person promotes and rolls back while the tick is about to act on what it read before."""
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        stale = world.trial
        world.conductor.roll_back(LINE)
        with pytest.raises(Conflict, match="not canary any more"):
            world.read(lambda conn: trials.move(conn, stale, Stage.PROMOTING, world.now, reason="late"))


def test_held_out_examples_are_never_trained_on(world):
    world.demonstrate(40)
    promoted(world)
    held_out = [e for held in world.read(lambda conn: ledger.holdouts(conn, LINE)).values() for e in held]
    assert held_out
    assert not [e for e in held_out if world.read(lambda conn, e=e: ledger.used_in(conn, e.feedback_id))]
