import contextlib
import dataclasses
import pickle
import sqlite3

import pytest

from replay import archive, ledger
from replay.records import FeedbackStatus, Receipt
from replay.writer import WriteFailed, Writer
from tests.replay.steps import steps


def test_an_interaction_comes_back_as_it_was_stored(conn, asked):
    full = asked(trial="t1", error="engine_error", ttft_seconds=0.1, is_trainable=False, prompt_tokens=7)
    assert ledger.record(conn, [full]) == []
    assert ledger.interaction(conn, "a1") == full
    assert ledger.interaction(conn, "nobody") is None


def test_recording_twice_keeps_the_first(conn, asked):
    ledger.record(conn, [asked(), asked(reply="changed")])
    ledger.record(conn, [asked(reply="changed again"), asked("a2")])
    assert ledger.sizes(conn).interactions == 2
    assert ledger.interaction(conn, "a1").reply == "changed"


def test_many_interactions_at_once_pass_the_limit_of_one_statement(conn, asked, said):
    early = said("a1100", metric_name="thumb", value=True, tags={"k": "v"}, comment="ok")
    ledger.give(conn, early)
    matched = ledger.record(conn, [asked(f"a{i}") for i in range(1200)])
    assert ledger.sizes(conn).interactions == 1200
    assert matched == [early]


def test_feedback_on_a_known_interaction_is_matched_and_learned_from(conn, asked, said):
    ledger.record(conn, [asked()])
    assert ledger.give(conn, said()) == Receipt("f-a1", FeedbackStatus.MATCHED, "a1", served_by="desk@v1")
    (example,) = ledger.fresh(conn, "desk")
    assert (example.reply, example.interaction_id, example.messages) == ("positive", "a1", asked().messages)


def test_feedback_that_comes_first_waits_and_is_learned_from_when_its_interaction_lands(conn, asked, said):
    assert ledger.give(conn, said()).status is FeedbackStatus.PENDING
    assert ledger.fresh(conn, "desk") == []
    assert ledger.record(conn, [asked()]) == [said()]
    assert ledger.record(conn, [asked()]) == []
    assert [e.reply for e in ledger.fresh(conn, "desk")] == ["positive"]
    assert ledger.feedback_view(conn, "f-a1").status is FeedbackStatus.MATCHED


def test_a_repeat_changes_nothing_and_says_so(conn, asked, said):
    ledger.record(conn, [asked()])
    ledger.give(conn, said())
    again = ledger.give(conn, dataclasses.replace(said(), received_at=999.0))
    assert again == Receipt("f-a1", FeedbackStatus.MATCHED, "a1", is_repeat=True, served_by="desk@v1")
    assert ledger.sizes(conn).feedback == {"matched": 1}
    assert len(ledger.fresh(conn, "desk")) == 1


def test_the_same_id_with_another_body_is_a_conflict_that_leaves_the_first(conn, said):
    ledger.give(conn, said())
    with pytest.raises(ledger.FeedbackConflict, match="f-a1"):
        ledger.give(conn, said(value="negative"))
    assert ledger.feedback_view(conn, "f-a1").feedback == said()


def test_feedback_that_waited_too_long_expires_and_stays_visible(conn, asked, said):
    ledger.give(conn, said("a1", received_at=10.0))
    ledger.give(conn, said("a2", received_at=30.0))
    assert ledger.expire(conn, before=20.0) == 1
    ledger.record(conn, [asked("a1"), asked("a2")])
    assert ledger.feedback_view(conn, "f-a1").status is FeedbackStatus.EXPIRED
    assert ledger.feedback_view(conn, "f-a2").status is FeedbackStatus.MATCHED
    assert ledger.expire(conn, before=1e9) == 0


def test_a_refusal_is_told_and_a_score_is_none(conn, asked, said):
    ledger.record(conn, [asked(is_trainable=False)])
    ledger.give(conn, said())
    ledger.give(conn, said(id="thumb", metric_name="thumb", value=True))
    assert ledger.feedback_view(conn, "f-a1").refusal == "not_trainable"
    assert ledger.feedback_view(conn, "thumb").refusal is None
    assert ledger.sizes(conn).refusals == {"not_trainable": 1}
    assert ledger.feedback_view(conn, "nobody") is None


def test_sizes_and_ages(conn, asked, said):
    ledger.record(conn, [asked("a1", at=5.0), asked("a2", at=6.0)])
    ledger.give(conn, said("a1"))
    ledger.give(conn, said("later", received_at=77.0))
    assert ledger.sizes(conn) == ledger.Sizes(
        interactions=2,
        open_interactions=2,
        oldest_open_at=5.0,
        feedback={"matched": 1, "pending": 1},
        oldest_pending_at=77.0,
        refusals={},
        examples={"desk": {"fresh": 1}},
        segments=0,
    )


def test_sealing_moves_the_words_out_and_keeps_the_join(conn, asked, said, tmp_path):
    ledger.record(conn, [asked("old", at=1.0), asked("older", at=0.5), asked("new", at=50.0)])
    ledger.give(conn, said("old"))
    assert ledger.seal(conn, tmp_path, older_than=10.0, max_rows=10) == 2
    assert ledger.seal(conn, tmp_path, older_than=10.0, max_rows=10) == 0
    slim = ledger.interaction(conn, "old")
    assert (slim.messages, slim.reply, slim.version) == ((), "", "desk@v1")
    assert ledger.interaction(conn, "old", tmp_path) == asked("old", at=1.0)
    assert ledger.interaction(conn, "new", tmp_path) == asked("new", at=50.0)
    (rows,) = archive.scan(tmp_path)
    assert [i.id for i in rows.interactions] == ["older", "old"]
    assert list(rows.feedback) == [said("old")]
    sizes = ledger.sizes(conn)
    assert (sizes.open_interactions, sizes.segments, sizes.feedback) == (1, 1, {"matched": 1})


def test_a_late_demonstration_finds_its_prompt_in_the_archive(conn, asked, said, tmp_path):
    ledger.record(conn, [asked("a1"), asked("a2")])
    ledger.seal(conn, tmp_path, older_than=1e9, max_rows=10)
    assert ledger.give(conn, said("a1"), tmp_path).status is FeedbackStatus.MATCHED
    assert [e.messages for e in ledger.fresh(conn, "desk")] == [asked("a1").messages]
    ledger.record(conn, [asked("a1")])
    assert ledger.interaction(conn, "a1").messages == ()


def test_a_seal_that_was_not_committed_is_written_again_in_its_place(conn, asked, tmp_path):
    ledger.record(conn, [asked("a1")])
    conn.commit()
    ledger.seal(conn, tmp_path, older_than=1e9, max_rows=10)
    conn.rollback()
    assert ledger.interaction(conn, "a1") == asked("a1")
    ledger.record(conn, [asked("a2", at=101.0)])
    assert ledger.seal(conn, tmp_path, older_than=1e9, max_rows=10) == 2
    (rows,) = archive.scan(tmp_path)
    assert [i.id for i in rows.interactions] == ["a1", "a2"]
    assert len(list(tmp_path.glob("*.parquet"))) == 2


def test_erasure_takes_the_words_everywhere_and_leaves_the_evidence(conn, asked, said, tmp_path):
    ledger.record(conn, [asked("a1"), asked("a2"), asked("a3")])
    ledger.give(conn, said("a1", comment="private"))
    ledger.give(conn, said("a1", id="thumb", metric_name="thumb", value=False))
    ledger.seal(conn, tmp_path, older_than=1e9, max_rows=2)
    assert ledger.forget(conn, tmp_path, ["a1", "a3", "nobody"]) == 2
    assert [i.id for rows in archive.scan(tmp_path) for i in rows.interactions] == ["a2"]
    assert ledger.interaction(conn, "a1", tmp_path).messages == ledger.interaction(conn, "a3", tmp_path).messages == ()
    view = ledger.feedback_view(conn, "f-a1")
    assert (view.feedback.value, view.feedback.comment) == ("", None)
    assert ledger.feedback_view(conn, "thumb").feedback.value is False
    assert ledger.fresh(conn, "desk") == []
    assert ledger.give(conn, said("a3", id="again"), tmp_path).status is FeedbackStatus.MATCHED
    assert ledger.feedback_view(conn, "again").refusal == "no_prompt"


def test_a_ledger_of_another_version_is_refused_and_ones_own_is_not(tmp_path):
    file = tmp_path / "ledger.db"
    ledger.refuse_another_schema(file)
    writer = Writer(file)
    writer.close()
    ledger.refuse_another_schema(file)  # its daemon died before it had tables
    writer = Writer(file)
    writer.submit(ledger.create).result()
    writer.close()
    ledger.refuse_another_schema(file)
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(ledger.AnotherSchema, match=f"tables of version 1, this learnd's are of version {ledger.SCHEMA}"):
        ledger.refuse_another_schema(file)


def test_a_ledger_from_before_there_were_findings_is_raised_where_it_lies(tmp_path, asked):
    file = tmp_path / "ledger.db"
    writer = Writer(file)
    writer.submit(ledger.create).result()
    writer.submit(lambda conn: ledger.record(conn, [asked("early")])).result()
    writer.close()
    with contextlib.closing(sqlite3.connect(file)) as db:
        for column in ("is_refusal", "has_form"):
            db.execute(f"ALTER TABLE interaction DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 5")
    ledger.refuse_another_schema(file)
    writer = Writer(file)
    with pytest.raises(WriteFailed, match="no such column"):  # the control: as it was, it cannot be read
        writer.submit(lambda conn: ledger.interaction(conn, "early")).result()
    for _ in range(2):
        writer.submit(ledger.create).result()
    writer.submit(lambda conn: ledger.record(conn, [asked("late", is_refusal=True, has_form=False)])).result()
    early, late = (writer.submit(lambda conn, name=name: ledger.interaction(conn, name)).result() for name in ("early", "late"))
    writer.close()
    assert early == asked("early")
    assert (late.is_refusal, late.has_form) == (True, False)
    with contextlib.closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (ledger.SCHEMA,)


def test_a_damaged_ledger_is_left_to_who_opens_it(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"no database" * 1000)
    ledger.refuse_another_schema(tmp_path / "ledger.db")


def test_measuring_it_costs_the_same_however_much_is_stored(conn, asked, said):
    ledger.record(conn, [asked()])
    ledger.give_all(conn, [said("a1", "x", id=f"d{i}", occurred_at=float(i)) for i in range(3)])  # two of them superseded
    thumbs = [said("a1", value=True, id=f"t{i}", metric_name="thumb") for i in range(2000)]
    ledger.give_all(conn, [*thumbs[:20], said("later", id="early")])
    few = steps(conn, lambda: ledger.sizes(conn))
    ledger.give_all(conn, thumbs)
    sizes = ledger.sizes(conn)
    assert (sizes.interactions, sizes.feedback, sizes.refusals) == (1, {"matched": 2003, "pending": 1}, {"superseded": 2})
    assert steps(conn, lambda: ledger.sizes(conn)) == few


@pytest.mark.parametrize("value", [True, False, 1, 0.5, "Grüße 🌍\n", {"role": "assistant", "content": "A"}])
def test_what_was_said_comes_back_as_it_was_said(conn, said, value):
    given = said("a1", value, tags={"b": "2", "a": "1"}, comment="ü", source="code", principal="p")
    ledger.give(conn, given)
    found = ledger.feedback_view(conn, given.id).feedback
    assert (found, type(found.value)) == (given, type(value))
    assert pickle.loads(pickle.dumps(given)) == given


def test_digests_tell_bodies_apart_and_not_their_order(said):
    bodies = [True, 1, "True", "1", {"a": 1}, '{"a": 1}']
    assert len({said("a1", value).body_digest() for value in bodies}) == len(bodies)
    ways = [said("a1", {"a": 1, "b": 2}, tags={"x": "1", "y": "2"}), said("a1", {"b": 2, "a": 1}, tags={"y": "2", "x": "1"})]
    assert len({way.body_digest() for way in ways}) == 1
