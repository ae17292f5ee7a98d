"""Thumbs and pairs on their way into a job: enough of them, each once, split by what was asked, given back when it fails."""

import pytest

from replay import ledger, opinions, quarantine, votes
from replay.guard import Guard, Standing
from replay.records import Split, Wanted, asked_digest, split_of

THUMBS = Wanted(thumbs={"thumb": True}, min_items=4, min_minority=2)
PAIRS = Wanted(corrections=True, picks=True, min_items=2)


def guards(_):
    return Guard()


def asks(split, count, start=0):
    """Questions that fall on one side of the split."""
    numbers = range(start, start + 500)
    alike = (
        f"Where is parcel {n}?" for n in numbers if split_of(asked_digest("desk", (user(f"Where is parcel {n}?"),))) is split
    )
    return [next(alike) for _ in range(count)]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def reply(conn, asked):
    def reply(name, prompt, text="It is on its way.", **fields):
        ledger.record(conn, [asked(name, prompt, reply=text, **{"finish_reason": "stop", **fields})])

    return reply


@pytest.fixture
def thumb(conn, reply, said):
    def thumb(name, value, prompt, *, again="", **fields):
        if not again:
            reply(name, prompt, **fields)
        ledger.give(conn, said(name, value, id=f"t-{name}{again}", metric_name="thumb", occurred_at=110.0 + len(again)))
        votes.review(conn, guards)

    return thumb


@pytest.fixture
def pick(conn, reply, said):
    def pick(number, prompt, *, better="Here it is.", worse="No idea.", value=None, **fields):
        reply(f"b{number}", prompt, better, **fields)
        reply(f"w{number}", prompt, worse, **fields)
        told = value or {"preferred": f"b{number}", "other": f"w{number}"}
        ledger.give(conn, said(f"w{number}", told, id=f"p{number}", metric_name="preference"))

    return pick


def take(conn, job="j1", wanted=THUMBS, **fields):
    opinions.reserve(conn, "desk", job, wanted, **{"guard": Guard(), **fields})
    return opinions.held(conn, job)


def reasons(conn):
    return {row.feedback_id: row.reason for row in conn.execute(opinions.opinion.select()) if row.reason}


def test_thumbs_say_which_reply_was_good_and_which_was_bad(conn, thumb):
    for n, prompt in enumerate(asks(Split.TRAIN, 4)):
        thumb(f"a{n}", n < 2, prompt)
    found = take(conn)
    assert [(one.good, one.bad) for one in found] == [("It is on its way.", None)] * 2 + [(None, "It is on its way.")] * 2
    assert {one.split for one in found} == {Split.TRAIN}
    assert found[0].messages[0]["role"] == "user"


def test_a_metric_may_mean_bad_by_true(conn, thumb):
    for n, prompt in enumerate(asks(Split.TRAIN, 4)):
        thumb(f"a{n}", n < 2, prompt)
    swapped = take(conn, wanted=Wanted(thumbs={"thumb": False}, min_items=4, min_minority=2))
    assert [one.good is None for one in swapped] == [True, True, False, False]
    assert take(conn, "j2", Wanted(thumbs={"other": True}, min_items=1, min_minority=0)) == []


@pytest.mark.parametrize(("up", "down"), [(3, 1), (1, 3), (2, 1), (4, 0)])
def test_too_little_waits_until_there_is_enough(conn, thumb, up, down):
    """Of the minority too, and only what trains counts."""
    prompts = asks(Split.TRAIN, up + down)
    for n, prompt in enumerate(prompts):
        thumb(f"a{n}", n < up, prompt)
    for n, prompt in enumerate(asks(Split.HOLDOUT, 4)):
        thumb(f"h{n}", n % 2 == 0, prompt)
    assert take(conn) == []
    assert opinions.counts(conn, "desk", THUMBS) == {"up": up + 2, "down": down + 2, "pairs": 0}
    for n, prompt in enumerate(asks(Split.TRAIN, 4, start=900)):
        thumb(f"b{n}", n % 2 == 0, prompt)
    found = take(conn, "j2")
    assert len(found) == up + down + 8
    assert sum(one.split is Split.HOLDOUT for one in found) == 4
    assert opinions.counts(conn, "desk", THUMBS) == {"up": 0, "down": 0, "pairs": 0, "reserved": len(found)}


def test_each_is_held_by_one_job_given_back_and_consumed_once(conn, thumb):
    for n, prompt in enumerate(asks(Split.TRAIN, 4)):
        thumb(f"a{n}", n < 2, prompt)
    first = take(conn, "j1")
    assert take(conn, "j1") == first, "asked again, the same"
    assert take(conn, "j2") == []
    ledger.release(conn, "j1")
    assert take(conn, "j2") == first
    ledger.reclaim(conn, "j1", [])
    assert opinions.held(conn, "j1") == [], "another has them"
    ledger.release(conn, "j2")
    ledger.reclaim(conn, "j2", [])
    assert opinions.held(conn, "j2") == first, "the version of an ended job is tried again"
    ledger.consume(conn, "j2", "desk@v1")
    ledger.release(conn, "j2")
    assert take(conn, "j3") == []
    assert ledger.feedback_view(conn, "t-a0").used_in == ["desk@v1"]


def test_the_last_word_on_a_reply_counts(conn, thumb):
    prompts = asks(Split.TRAIN, 4)
    for n, prompt in enumerate(prompts):
        thumb(f"a{n}", n < 3, prompt)
    thumb("a0", False, prompts[0], again="!")
    found = take(conn)
    assert [one.id for one in found if one.bad] == ["t-a0!", "t-a3"]
    assert "t-a0" not in {one.id for one in found}
    ledger.consume(conn, "j1", "desk@v1")
    assert take(conn, "j2", Wanted(thumbs={"thumb": True}, min_items=1, min_minority=0)) == [], "nor does the first come back"


def test_a_corrected_reply_is_a_pair_and_no_good_one(conn, thumb, said):
    prompts = asks(Split.TRAIN, 3)
    for n, prompt in enumerate(prompts):
        thumb(f"a{n}", n == 0, prompt)
        ledger.give(conn, said(f"a{n}", f"Parcel {n} is in Rome."))
    ledger.reserve(conn, "desk", "j1")
    wanted = Wanted(thumbs={"thumb": True}, corrections=True, min_items=2, min_minority=0)
    found = {one.id: (one.good, one.bad) for one in take(conn, wanted=wanted)}
    assert found == {
        **{f"f-a{n}": (f"Parcel {n} is in Rome.", "It is on its way.") for n in range(3)},
        **{f"t-a{n}": (None, "It is on its way.") for n in (1, 2)},
    }


def test_a_correction_waits_as_a_pair_when_its_example_is_learned_already(conn, thumb, said):
    first, second, third = asks(Split.TRAIN, 3)
    for name, prompt in (("a", first), ("b", second), ("c", third)):
        thumb(name, False, prompt)
        ledger.give(conn, said(name, f"{name} is in Rome."))
        if name == "a":
            ledger.reserve(conn, "desk", "j1")
            assert take(conn, "j1", PAIRS) == [], "one is too few"
            ledger.consume(conn, "j1", "desk@v1")
    assert take(conn, "j1", PAIRS) == []
    ledger.reserve(conn, "desk", "j2")
    assert [one.id for one in take(conn, "j2", PAIRS)] == ["f-a", "f-b", "f-c"]


@pytest.mark.parametrize("finish", ["stop", "completed", "end_turn", "stop_sequence", None])
def test_the_better_of_two_replies_is_picked(conn, pick, finish):
    for n, prompt in enumerate(asks(Split.TRAIN, 2)):
        pick(n, prompt, finish_reason=finish)
    assert [(one.good, one.bad) for one in take(conn, wanted=PAIRS)] == [("Here it is.", "No idea.")] * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"is_trainable": False}, "not_trainable"),
        ({"finish_reason": "length"}, "cut_off"),
        ({"finish_reason": "max_tokens"}, "cut_off"),
        ({"finish_reason": "tool_use"}, "cut_off"),
        ({"error": "engine_error"}, "cut_off"),
        ({"better": "No  idea."}, "no_pair"),
        ({"value": {"preferred": "elsewhere", "other": "w9"}}, "no_pair"),
        ({"value": {"preferred": "b0", "other": "w9"}}, "no_pair"),
        ({"better": "<|im_start|>system"}, "template_markers"),
        (
            {
                "prompt": "Say: it was opened in the spring by the king himself",
                "better": "it was opened in the spring by the king",
            },
            "echo",
        ),
        ({"line": ""}, None),
        ({"value": {"preferred": "b9", "other": "w9", "tied": "good"}}, None),
    ],
)
def test_what_cannot_be_learned_from_is_refused_with_its_reason(conn, pick, fields, reason):
    first, second, third = asks(Split.TRAIN, 3)
    pick(0, first)
    pick(1, second)
    pick(9, **{"prompt": third, **fields})
    assert [one.id for one in take(conn, wanted=PAIRS)] == ["p0", "p1"]
    assert reasons(conn) == ({"p9": reason} if reason else {})


ONE = Wanted(thumbs={"thumb": True}, corrections=True, picks=True, min_items=1, min_minority=0)


def cases(conn):
    stands = (Standing.HELD, Standing.REFUSED, Standing.RELEASED, Standing.DROPPED)
    return {one.feedback_id: one for one in quarantine.cases(conn, "desk", stands, None, 9)}


def decide(conn, feedback_id, decision):
    return quarantine.decide(conn, feedback_id, decision, "boss", 9.0, guards)


def test_what_was_stopped_is_seen_counted_and_released_for_the_next_job(conn, pick):
    for n, prompt in enumerate(asks(Split.TRAIN, 2)):
        pick(n, prompt)
    pick(9, asks(Split.TRAIN, 3)[-1], finish_reason="length")
    take(conn, wanted=PAIRS)
    (case,) = cases(conn).values()
    assert (case.feedback_id, case.kind, case.reason, case.state) == ("p9", "pick", "cut_off", Standing.REFUSED)
    assert (case.principal, case.decided_by) == ("anonymous/unit-w9", None)
    assert quarantine.counts(conn) == {"desk": {"refused": {"cut_off": 1}}}
    assert ledger.feedback_view(conn, "p9").refusal == "cut_off"
    assert take(conn, "j2", ONE) == []

    assert decide(conn, "p9", "release").state is Standing.RELEASED
    assert quarantine.counts(conn) == {}
    assert ledger.feedback_view(conn, "p9").refusal is None
    assert [one.id for one in take(conn, "j2", ONE)] == ["p9"]
    ledger.release(conn, "j2")
    assert [one.id for one in take(conn, "j3", ONE)] == ["p9"], "a person's word holds for the job after, too"
    ledger.consume(conn, "j3", "desk@v1")
    assert ledger.feedback_view(conn, "p9").used_in == ["desk@v1"]
    assert decide(conn, "p9", "release") == cases(conn)["p9"], "said again, nothing changes"
    assert (cases(conn)["p9"].reason, cases(conn)["p9"].decided_by) == ("cut_off", "boss")
    with pytest.raises(quarantine.NotHeld, match="is trained: a job has it"):
        decide(conn, "p9", "drop")


def test_what_is_dropped_never_comes_back(conn, thumb):
    for n, prompt in enumerate(asks(Split.TRAIN, 3)):
        thumb(f"a{n}", True, prompt, error="engine_error" if n == 2 else None)
    take(conn, wanted=ONE)
    ledger.release(conn, "j1")
    decide(conn, "t-a2", "release")
    assert decide(conn, "t-a2", "drop").kind == "thumb"
    assert [one.id for one in take(conn, "j2", ONE)] == ["t-a0", "t-a1"]
    assert quarantine.counts(conn) == {"desk": {"dropped": {"cut_off": 1}}}
    assert ledger.feedback_view(conn, "t-a2").refusal == "cut_off"


def test_what_cannot_be_learned_from_is_released_by_nobody(conn, pick):
    pick(0, asks(Split.TRAIN, 1)[0], better="No  idea.")
    take(conn, wanted=ONE)
    with pytest.raises(quarantine.NotHeld, match="no_pair"):
        decide(conn, "p0", "release")
    assert cases(conn)["p0"].state is Standing.REFUSED


def test_a_correction_without_a_pair_is_an_example_all_the_same(conn, reply, said):
    reply("a", asks(Split.TRAIN, 1)[0], error="client_disconnected")
    ledger.give(conn, said("a", "In Rome."), guards=guards)
    ledger.reserve(conn, "desk", "j1")
    assert take(conn, wanted=ONE) == []
    assert (cases(conn)["f-a"].kind, cases(conn)["f-a"].reason) == ("correction", "cut_off")
    assert ledger.feedback_view(conn, "f-a").refusal == "cut_off"
    assert ledger.sizes(conn).refusals == {}, "something is learned from it"
    decide(conn, "f-a", "drop")
    assert [one.feedback_id for one in ledger.reserved(conn, "j1")] == ["f-a"]
    decide(conn, "f-a", "release")
    assert [(one.good, one.bad) for one in take(conn, wanted=ONE)] == [("In Rome.", "It is on its way.")]


def test_an_erased_reply_leaves_no_case(conn, thumb, tmp_path):
    thumb("a", True, asks(Split.TRAIN, 1)[0], finish_reason="length")
    take(conn, wanted=ONE)
    assert list(cases(conn)) == ["t-a"]
    decide(conn, "t-a", "release")
    ledger.forget(conn, tmp_path, ["a"])
    assert [one.kind for one in cases(conn).values()] == ["vote"], "the vote's own"


def test_a_ledger_from_before_anybody_could_decide_opens(conn, thumb):
    thumb("a", True, asks(Split.TRAIN, 1)[0], finish_reason="length")
    conn.exec_driver_sql("DROP TABLE ruling")
    conn.exec_driver_sql("DROP INDEX opinion_by_reason")
    ledger.create(conn)
    take(conn, wanted=ONE)
    assert decide(conn, "t-a", "release").state is Standing.RELEASED


def test_opinions_stand_on_the_side_of_the_split_where_examples_do(conn, thumb, asked, said):
    """Also where a nearly equal question was there before, whose side its examples took."""
    guard = Guard()
    for n, prompt in enumerate(asks(Split.TRAIN, 4)):
        thumb(f"a{n}", n < 2, prompt)
    moved = asks(Split.TRAIN, 5)[-1]
    ledger.record(conn, [asked("e", moved)])
    ledger.give(conn, said("e", "In Rome."), guards=lambda _: guard)
    other = asked_digest("desk", (user(asks(Split.HOLDOUT, 1)[0]),))
    conn.execute(opinions.vetted.update().values(cluster=other))
    thumb("z", True, moved)
    assert {one.id: one.split for one in take(conn)}["t-z"] is Split.HOLDOUT


def test_they_are_cleaned_and_capped_as_examples_are(conn, thumb, said, reply):
    for n, prompt in enumerate(asks(Split.TRAIN, 30)):
        reply(f"a{n}", prompt + " Write to jo@example.org", "I wrote to jo@example.org.", unit="u" if n < 20 else f"u{n}")
        ledger.give(conn, said(f"a{n}", n % 2 == 0, id=f"t-a{n}", metric_name="thumb", principal="web"))
    votes.review(conn, guards)
    found = take(conn, guard=Guard(fair_shares=1.0))
    assert {one.good or one.bad for one in found} == {"I wrote to <EMAIL_1>."}
    assert sum(one.id in {f"t-a{n}" for n in range(20)} for one in found) == 5, "the first five of one principal"
    assert take(conn, "j2") == []
    assert quarantine.counts(conn)["desk"] == {"held": {"over_principal_cap": 15}}, "a person decides on the others"
    for n in range(5, 20):
        decide(conn, f"t-a{n}", "release")
    assert len(take(conn, "j2", ONE)) == 15


def test_what_is_erased_teaches_nothing(conn, thumb, tmp_path):
    for n, prompt in enumerate(asks(Split.TRAIN, 5)):
        thumb(f"a{n}", n < 2, prompt)
    take(conn)
    ledger.forget(conn, tmp_path, ["a0"])
    assert "t-a0" not in {one.id for one in opinions.held(conn, "j1")}
    ledger.release(conn, "j1")
    assert take(conn, "j2") == [], "one thumb up is too few now"


def test_a_sealed_reply_is_read_from_the_archive(conn, thumb, tmp_path):
    for n, prompt in enumerate(asks(Split.TRAIN, 4)):
        thumb(f"a{n}", n < 2, prompt)
    ledger.seal(conn, tmp_path, 1e9, 9)
    assert len(take(conn, folder=tmp_path)) == 4
