"""Which of the new examples did harm: the search by itself, then on the way through jobs, gate and quarantine."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import ledger, quarantine
from replay.guard import Guard
from replay.records import Feedback
from service import audit, bisecting, registry, status
from service.errors import Conflict, NotFound
from service.jobs import State
from service.rollout import bisection
from service.rollout.bisection import End, Said, Search, proceed
from tests.service.world import LINE, QUICK, World

IDS = tuple(f"e{i}" for i in range(64))


KEEPS = Said("keeps")


def run(loses, suspects=IDS, jobs=100, step=proceed):
    """Search with an oracle that says what a group loses of the slice, or whether it does: the end, and the jobs that it took."""
    found, used = bisection.check(bisection.begin(suspects, jobs)), 0
    while isinstance(found, Search):
        used += 1
        loss = float(loses(found.half))
        found = step(found, Said("loses", loss) if loss else KEEPS)
    return found, used


def trusting(search, said):
    """The wrong variant, which saves a job: what the first half does not do, the second must."""
    if said == KEEPS and not search.is_second and not search.control:
        middle = len(search.suspects) // 2
        half, others = search.suspects[middle:], search.suspects[:middle] + search.others
        return bisection.check(Search(half, search.asked, search.jobs_left - 1, others=others))
    return proceed(search, said)


def hasty(search, said):
    """The wrong variant, which saves a job: a first half that loses the slice is followed, and the second never tried."""
    if said.outcome == "loses" and not search.is_second and not search.control:
        left = Search(search.suspects, search.asked, search.jobs_left, is_second=True, first=said.loss, others=search.others)
        return proceed(left, KEEPS)
    return proceed(search, said)


groups = st.sets(st.sampled_from(IDS), min_size=1, max_size=5)


class TestSearch:
    @given(st.integers(2, 64), st.data())
    def test_one_harmful_example_is_named_by_two_jobs_for_each_halving(self, count, data):
        suspects, harmful = IDS[:count], data.draw(st.sampled_from(IDS[:count]))
        found, used = run(lambda half: harmful in half, suspects)
        assert used <= 2 * math.ceil(math.log2(count)) + 1
        assert found.named == (harmful,)

    @given(groups)
    def test_of_several_that_each_do_it_one_is_named(self, harmful):
        tried = []
        found, _ = run(lambda half: tried.append(half) or bool(harmful & set(half)))
        assert set(found.named) <= harmful
        controls = tried[-bisection.CONTROLS :]
        assert len(found.named) == 1 or all(set(control) <= harmful for control in controls)

    @given(st.integers(1, 16))
    def test_where_so_few_lose_it_whichever_they_are_nobody_is_named(self, innocent):
        """A handful loses the slice by being a handful; of more, sixteen harmful ones. Without a control the first is accused."""

        def loses(half):
            return len(half) <= 16 or len(set(half) - set(IDS[:innocent])) >= 16

        def uncontrolled(search, said):
            found = proceed(search, said)
            return End("found", found.suspects, "") if isinstance(found, Search) and found.control else found

        found, _ = run(loses)
        assert found.named == ()
        assert found.reason.endswith("whichever they are")
        assert run(loses, step=uncontrolled)[0].named == IDS[:1]

    @given(st.integers(1, 8))
    def test_where_a_lesson_in_something_else_costs_the_slice_too_those_are_named_that_cost_more(self, count):
        """The innocent come first, as in time: a dozen of them forget a tenth of the slice. The hasty search goes there, and finds none."""
        harmful = set(IDS[32 : 32 + count])

        def loses(half):
            return len(harmful & set(half)) / count or (0.1 if len(half) >= 12 else 0.0)

        found, _ = run(loses)
        assert found.outcome == "found"
        assert set(found.named) <= harmful
        assert not harmful & set(run(loses, step=hasty)[0].named)

    @given(st.integers(1, 9))
    def test_fewer_than_the_smallest_are_never_tried(self, smallest):
        sizes, found = [], bisection.check(bisection.begin(IDS, 100, smallest))
        while isinstance(found, Search):
            sizes.append(len(found.half))
            found = proceed(found, Said("loses", 1.0) if IDS[5] in found.half else KEEPS)
        assert min(sizes) >= smallest
        assert found.named == (IDS[5],), "halves that have fewer are filled up with those that keep the slice"

    def test_nothing_that_may_be_harmful_fills_a_half_up(self):
        """Where each half loses the slice nobody is known to keep it: then fewer cannot be told apart."""
        found = bisection.check(bisection.begin(IDS[:31], 100, 8))
        while isinstance(found, Search):
            assert found.control or set(found.half) <= set(found.suspects)
            found = proceed(found, Said("loses", 1.0))
        assert found.reason.startswith("15 of 31 examples lose the slice, and as many others")

    @pytest.mark.parametrize(("slices", "named"), [(("a",) * 20, 10), (("a",) * 6 + ("b",) * 14, 6)])
    def test_where_fewer_cannot_be_told_apart_up_to_a_half_is_named(self, slices, named):
        """Of 20, with 6 in a step, three of the first lose the slice together, and no two of them do."""
        found = bisection.check(bisection.begin(IDS[:20], 100, 6, slices))
        while isinstance(found, Search):
            found = proceed(found, Said("loses", 1.0) if {IDS[1], IDS[3], IDS[5]} <= set(found.half) else KEEPS)
        assert (found.outcome, len(found.named)) == ("found", named)

    @given(groups)
    def test_whatever_is_named_loses_the_slice_by_itself(self, harmful):
        """Also where it takes all of them together, which no half may have."""
        found, _ = run(lambda half: harmful <= set(half))
        assert not found.named or harmful <= set(found.named)

    @pytest.mark.parametrize("count", [63, 64])
    def test_a_half_is_named_where_it_takes_all_of_it_and_no_more(self, count):
        suspects, middle = IDS[:count], count // 2
        found, _ = run(lambda half: set(suspects[middle:]) <= set(half), suspects)
        assert found == End(
            "found", suspects[middle:], f"{count - middle} of {count} examples lose the slice, as many others keep it"
        )
        early, _ = run(lambda half: set(suspects[middle:]) <= set(half), suspects, jobs=4)
        assert early.named == (), "out of jobs, nobody knows whether it takes all of them"

    def test_the_first_cut_is_between_two_slices_and_later_ones_are_in_the_middle(self):
        """Wrong lessons of one slice are named without the right ones of the other; cut in the middle, some of those go with them."""
        slices = ["colours"] * 13 + ["sizes"] * 18
        suspects, wrong = IDS[:31], set(IDS[:13])

        def found(slices):
            search = bisection.begin(suspects, 100, 4, slices)
            while isinstance(search, Search):
                loss = len(wrong & set(search.half)) / 13
                search = proceed(search, Said("loses", loss) if loss > 0.7 else Said("keeps"))
            return search

        assert set(found(slices).named) == wrong
        assert set(found(()).named) > wrong
        first = bisection.begin(suspects, 100, 4, slices)
        assert (first.half, first.seam) == (IDS[:13], 13)
        second = proceed(first, Said("loses", 1.0))
        assert second.half == IDS[13:31]
        assert len(proceed(second, Said("keeps")).half) == 6
        assert Search.from_json(second.to_json()) == second

    @pytest.mark.parametrize(
        ("slices", "smallest", "at"),
        [
            ("", 1, 0),
            ("aaaa", 1, 0),
            ("abbb", 1, 1),
            ("abbb", 2, 0),
            ("aabbcc", 1, 2),
            ("aaabcc", 2, 3),
            ("ab", 1, 1),
            ("ab", 2, 0),
        ],
    )
    def test_it_is_the_one_nearest_to_the_middle_with_enough_on_both_sides(self, slices, smallest, at):
        assert bisection.begin(IDS[: len(slices)], 9, smallest, slices).seam == at

    def test_the_variant_that_trusts_accuses_the_innocent(self):
        harmful = {IDS[0], IDS[63]}
        assert run(lambda half: harmful <= set(half))[0] == End(
            "not_found", (), "64 of 64 examples lose the slice: neither half of them does it alone"
        )
        accused, _ = run(lambda half: harmful <= set(half), step=trusting)
        assert accused.named
        assert not harmful <= set(accused.named)

    @given(groups, st.integers(1, 12))
    def test_it_never_takes_more_jobs_than_it_has(self, harmful, jobs):
        found, used = run(lambda half: bool(harmful & set(half)), jobs=jobs)
        assert used <= jobs
        assert not found.named or len(found.named) * bisection.NARROW <= len(IDS)

    def test_a_job_without_a_verdict_ends_it(self):
        unknown = Said("unknown")
        assert proceed(bisection.begin(IDS, 9), unknown).outcome == "not_found"
        narrow = proceed(Search(IDS[:4], 64, 9, others=IDS[4:]), unknown)
        assert proceed(narrow, KEEPS).named == IDS[:4]  # known to lose it from before
        assert proceed(narrow, unknown).named == ()

    def test_it_is_stored_and_read_back(self):
        search = Search(IDS[:5], 64, 3, is_second=True, first=0.25, others=IDS[5:9])
        assert Search.from_json(json.loads(json.dumps(search.to_json()))) == search
        assert search.half == IDS[2:5]

    def test_a_verdict_names_the_worst_slice_that_was_lost(self):
        kept = {"name": "a", "must": "not_lose", "outcome": "pass", "low": -0.9}
        lost = [
            {"name": n, "must": "not_lose", "outcome": "fail", "low": low, "champion": 1, "candidate": 0.25}
            for n, low in (("b", -0.2), ("c", -0.5))
        ]
        gain = {"name": "new", "must": "gain", "outcome": "fail", "low": -1.0}
        assert bisection.lost({"findings": [kept, gain, *lost]}) == "c"
        assert bisection.lost({"findings": [kept, gain]}) is bisection.lost(None) is None
        assert bisection.said_of({"findings": [kept, *lost]}, "b") == Said("loses", 0.75)
        assert bisection.said_of({"findings": [kept, gain]}, "b") == KEEPS
        assert bisection.said_of(None, "b") == Said("unknown")


class Guarded(World):
    """A world whose line has a guard, and one correction that undoes an older slice."""

    poison = "label of i7"

    def demonstrate(self, count, slice="new"):
        asked = [self._interaction(slice) for _ in range(count)]
        said = [Feedback(f"d-{i.id}", i.id, "demonstration", f"label of {i.id}", self.now, self.now) for i in asked]
        self.read(lambda conn: [ledger.record(conn, asked), ledger.give_all(conn, said, guards=lambda _: Guard())])

    def outcome_of(self, folder):
        """The job loses the older slice if it was trained on the poison."""
        rows = [json.loads(row) for row in (folder / "examples.jsonl").read_text().splitlines()]
        trained = {row["reply"] for row in rows if row["split"] == "train"}
        return {"older": {"old": (1.0, 0.0 if self.poison in trained else 1.0)}}

    def search(self):
        return self.read(lambda conn: bisecting.last(conn, LINE))

    def poisoned(self):
        """The id of the harmful example, and of its feedback."""
        (found,) = (e for e in self.read(lambda conn: ledger.fresh(conn, LINE)) if e.reply == self.poison)
        return found.id, found.feedback_id


def world_of(folder, count=24, batch_size=1, slices=("new",), **gate):
    settings = {**QUICK["lines"][LINE], "trigger": {"min_examples": count, "cooldown_seconds": 0}}
    settings["learning"] = {**settings.get("learning", {}), "batch_size": batch_size, "accumulation": 1}
    world = Guarded(folder, {"lines": {LINE: {**settings, "gate": {**settings["gate"], **gate}}}}, replicas=1)
    world.outcome = world.launcher.outcome = world.outcome_of
    for place in range(count):
        world.demonstrate(1, slices[place % len(slices)])
    train = [e.reply for e in world.read(lambda conn: ledger.fresh(conn, LINE)) if e.split.value == "train"]
    world.poison = train[len(train) // 3]
    return world


def ended(world):
    return world.search() is not None and world.search()["ended_at"] is not None


@pytest.fixture
def world(tmp_path):
    world = world_of(tmp_path, bisect=True)
    yield world
    world.writer.close()


class TestOnTheWay:
    def test_a_harmful_example_is_found_held_and_the_rest_is_learned(self, world):
        known, said = world.poisoned()
        world.until(ended)
        found = world.search()
        assert (found["job"], found["slice"], found["outcome"], found["named"]) == ("desk-job1", "old", "found", [known])
        assert world.read(lambda conn: registry.versions(conn, LINE)) == []
        case = world.read(lambda conn: quarantine.case(conn, said))
        assert (case.state, case.reason) == ("held", "harmful")
        assert world.examples == {"fresh": 23}
        assert world.step() == []  # by itself it does not learn again what was tried
        assert world.conductor.train(LINE).examples == 23
        world.until(lambda w: w.trial is not None)
        steps = [one["body"]["does"] for one in world.read(lambda conn: audit.events(conn, LINE, "bisected"))]
        assert steps[0] == "begin"
        assert steps[-1] == "end"
        assert 4 <= steps.count("try") <= 10
        shown = world.read(lambda conn: status.stored(conn, world.settings, world.now))["lines"][LINE]["bisection"]
        assert json.loads(json.dumps(shown)) == shown

    def test_a_part_is_learned_beside_as_much_rehearsal_as_the_whole(self, tmp_path):
        world = world_of(tmp_path, bisect=True)
        world.until(ended)
        found = []
        for folder in (world.settings.data_dir / "jobs").iterdir():
            rows = [json.loads(row) for row in (folder / "examples.jsonl").read_text().splitlines()]
            ratio = json.loads((folder / "spec.json").read_text())["learning"]["replay_ratio"]
            found.append((ratio, sum(row["split"] == "train" for row in rows)))
        whole, *halves = sorted(found, key=lambda one: -one[1])
        assert len(halves) >= 4
        assert whole[0] == world.settings.lines[LINE].learning.replay_ratio > 0
        assert all(ratio * count == pytest.approx(whole[0] * whole[1]) for ratio, count in halves)
        world.writer.close()

    def test_its_first_halves_are_of_a_slice_each(self, tmp_path):
        world = world_of(tmp_path, bisect=True, slices=("new", "other"))
        known, _ = world.poisoned()
        world.until(ended)
        assert world.search()["named"] == [known]
        tried = [world.settings.data_dir / "jobs" / f"desk-job{number}" / "examples.jsonl" for number in (2, 3)]
        rows = [[json.loads(row) for row in file.read_text().splitlines()] for file in tried]
        assert [{row["slice"] for row in told if row["split"] == "train"} for told in rows] == [{"new"}, {"other"}]
        world.writer.close()

    def test_meanwhile_nothing_else_takes_the_examples(self, world):
        world.until(lambda w: w.search() is not None)
        with pytest.raises(Conflict):
            world.conductor.train(LINE)
        world.demonstrate(30)
        world.until(ended)
        assert {job.trigger for job in world.read(lambda conn: bisecting.jobs.of(conn, LINE))} == {"examples", "bisect"}

    def test_nothing_is_searched_unless_that_is_asked_for(self, tmp_path):
        world = world_of(tmp_path)
        known, _ = world.poisoned()
        world.until(lambda w: w.job is not None and w.job.state is State.REJECTED)
        for _ in range(3):
            world.step()
        assert world.search() is None
        with pytest.raises(NotFound):
            world.conductor.bisect("desk-job9")
        assert world.conductor.bisect("desk-job1")["slice"] == "old"
        with pytest.raises(Conflict, match="already"):
            world.conductor.bisect("desk-job1")
        world.until(ended)
        assert world.search()["named"] == [known]
        with pytest.raises(Conflict, match="nothing to search"):
            world.conductor.bisect(world.job.id)  # a job of the search
        world.writer.close()

    def test_out_of_jobs_it_accuses_nobody(self, tmp_path):
        world = world_of(tmp_path, bisect=True, bisect_jobs=1)
        world.until(ended)
        assert (world.search()["outcome"], world.search()["named"]) == ("not_found", [])
        assert world.examples == {"fresh": 24}
        world.writer.close()

    def test_no_job_is_on_fewer_than_the_batch_of_a_step(self, tmp_path):
        world = world_of(tmp_path, batch_size=5, bisect=True)
        known, _ = world.poisoned()
        world.until(ended)
        tries = [
            one["body"] for one in world.read(lambda conn: audit.events(conn, LINE, "bisected")) if one["body"]["does"] == "try"
        ]
        assert min(one["examples"] for one in tries) >= 5
        assert world.search()["outcome"] == "found"
        assert world.search()["named"] == [known]
        world.writer.close()

    def test_a_job_that_dies_for_good_ends_it(self, world):
        world.until(lambda w: w.search() is not None and w.search()["probe"])
        world.launcher.dies = ["out of memory"] * 5
        world.until(ended)
        assert "no verdict" in world.search()["reason"]
        assert world.examples == {"fresh": 24}

    def test_what_a_person_released_stays(self, world):
        known, said = world.poisoned()
        world.until(lambda w: w.search() is not None)
        world.read(lambda conn: conn.execute(quarantine.update(quarantine.vetted).values(state="released")))
        world.until(ended)
        assert world.search()["named"] == [known]
        assert world.read(lambda conn: quarantine.case(conn, said)).state == "released"
        assert world.examples == {"fresh": 24}
