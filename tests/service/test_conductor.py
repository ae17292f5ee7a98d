"""The loop from demonstrations to a champion, on a real database with a fake launcher and fake replicas."""

import pytest
import structlog

from replay import ledger
from service import jobs, registry
from service.errors import Conflict, NotFound, StorageFailed
from service.rollout import trials
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
        assert change.feedback_to_live_seconds > 0
        assert change.swap_seconds is not None
        (version,) = world.read(lambda conn: registry.versions(conn, LINE))
        assert (version.state, version.gate["outcome"], version.scores["new"]["n"]) == ("live", "pass", 60)
        assert (world.folder / "versions" / "desk" / "v1" / "COMPLETE").exists()

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
        assert (world.folder / "jobs" / "desk-job2" / "older.jsonl").read_text()
        assert [v.state for v in world.read(lambda conn: registry.versions(conn, LINE))] == ["live", "retired"]
        assert world.conductor.remembered(LINE).keys() == {"new", "second"}

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

    def test_one_that_must_wait_waits(self, make):
        world = make(rules(is_automatic=False))
        world.quality = {"desk@v1": 0.8}
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.WAITING, customers=10)
        assert world.step(customers=10) == [] or world.trial.stage is Stage.WAITING
        world.conductor.promote(LINE)
        promoted(world)

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

    def test_an_old_version_is_proven_before_it_answers(self, world):
        world.demonstrate(40)
        promoted(world)
        world.conductor.roll_back(LINE)
        trial = world.conductor.promote(LINE, "desk@v1")
        assert (trial.stage, trial.is_operator, world.champion) == (Stage.VERIFYING, True, None)
        promoted(world, customers=0)
        assert world.champion == "desk@v1"
        assert world.examples == {"trained": 40}

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
