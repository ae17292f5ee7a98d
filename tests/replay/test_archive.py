import os
import subprocess
import sys

import pyarrow as pa
import pytest

from replay import archive
from replay.archive import ArchiveDamaged, Rows, erase, find, scan, seal
from replay.tables import row_of


@pytest.fixture
def rows(asked, said):
    def build(*ids):
        return Rows(
            [asked(i, ttft_seconds=None, error="x") for i in ids], [said(i, {"content": i}, tags={"a": "b"}) for i in ids]
        )

    return build


def test_what_is_sealed_comes_back_as_it_was(rows, tmp_path):
    seal(rows("a", "b"), tmp_path, 1)
    seal(rows(), tmp_path, 2)
    assert list(scan(tmp_path)) == [rows("a", "b"), rows()]
    assert find(tmp_path, "b") == find(tmp_path, "b", 1) == rows("b").interactions[0]
    assert find(tmp_path, "b", 2) is find(tmp_path, "b", 9) is find(tmp_path, "nobody") is None


def test_every_text_and_every_number_survives(asked, said, tmp_path):
    odd = 'quote " slash \\ line \n nul \0 emoji \U0001f9ea 2024-01-01T00:00:00Z'
    whole = Rows(
        [
            asked(
                odd,
                odd,
                reply=odd,
                at=1790000000.1234567,
                latency_seconds=1e-9,
                prompt_tokens=2**40,
                ttft_seconds=0.1,
                has_form=False,
            )
        ],
        [said(odd, value, id=f"f{i}", tags={odd: odd}) for i, value in enumerate([True, 0.1, odd, {"content": None}])],
    )
    seal(whole, tmp_path, 1)
    assert list(scan(tmp_path)) == [whole]
    assert find(tmp_path, odd) == whole.interactions[0]


def test_a_segment_from_before_there_were_findings_is_read_and_rewritten(asked, tmp_path):
    names = [name for name in archive._INTERACTION.names if name not in {"is_refusal", "has_form"}]
    early = Rows([asked("a"), asked("b")], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_INTERACTION", pa.schema([archive._INTERACTION.field(name) for name in names]))
        patch.setattr(archive, "row_of", lambda record: {name: row_of(record)[name] for name in names})
        seal(early, tmp_path, 1)
    assert list(scan(tmp_path)) == [early]
    assert find(tmp_path, "a") == asked("a")
    assert erase(tmp_path, ["a"]) == 1
    assert list(scan(tmp_path)) == [Rows([asked("b")], [])]


def test_no_folder_is_an_empty_archive(tmp_path):
    assert list(scan(tmp_path / "none")) == []
    assert find(tmp_path / "none", "a") is None


def test_a_segment_without_its_manifest_does_not_exist(rows, tmp_path):
    seal(rows("a"), tmp_path, 1).unlink()
    assert list(scan(tmp_path)) == []
    assert find(tmp_path, "a", 1) is None
    seal(rows("a", "b"), tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_changed_or_missing_file_is_noticed(rows, tmp_path):
    seal(rows("a"), tmp_path, 1)
    (path,) = tmp_path.glob("*.interactions.parquet")
    path.write_bytes(path.read_bytes()[:-9] + b"corrupted")
    with pytest.raises(ArchiveDamaged, match=path.name):
        list(scan(tmp_path))
    path.unlink()
    with pytest.raises(ArchiveDamaged, match=path.name):
        find(tmp_path, "a", 1)


def test_erasure_rewrites_the_segments_that_hold_it_and_no_others(rows, asked, said, tmp_path):
    seal(rows("a", "b"), tmp_path, 1)
    untouched = seal(rows("c"), tmp_path, 2).stat().st_ino
    seal(Rows([], [said("a", id="late")]), tmp_path, 3)
    assert erase(tmp_path, ["a", "nobody"]) == 3
    assert list(scan(tmp_path)) == [rows("b"), rows("c"), rows()]
    assert (tmp_path / "00000002.json").stat().st_ino == untouched
    assert not [p for p in tmp_path.iterdir() if b"question a" in p.read_bytes()]
    assert erase(tmp_path, ["a"]) == 0


CRASH = """
import os, signal, sys
from itertools import count
from pathlib import Path
from replay import archive
from replay.records import Arm, Interaction
def rows(word):
    said = ({"role": "user", "content": word},)
    return archive.Rows([Interaction(word, "desk", "desk@v1", Arm.CHAMPION, "u", "s", said, "r", 1.0)], [])
def rewrite(folder, fatal):
    calls = count(1)
    def strike(event, _):
        if event in {"open", "os.rename", "os.remove", "os.listdir", "os.scandir"} and next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(strike)
    archive.seal(rows("after"), folder, 1)
    os._exit(0)
for fatal in count(1):
    folder = Path(sys.argv[1]) / str(fatal)
    archive.seal(rows("before"), folder, 1)
    child = os.fork() or rewrite(folder, fatal)
    if os.waitpid(child, 0)[1] == 0:
        break
assert "pandas" not in sys.modules  # seconds to import, in the ledger's own thread
"""


def test_a_rewrite_killed_at_any_call_on_a_file_leaves_the_old_or_the_new(tmp_path):
    """An audit hook kills the process at its n-th opening, renaming or removing of a file, for every n there is."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=True, env=environment)
    ends = []
    for folder in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        (rows,) = scan(folder)
        ends += [i.id for i in rows.interactions]
        seal(rows, folder, 1)
        assert len(list(folder.iterdir())) == 3
    assert len(ends) >= 8
    assert ends == sorted(ends, reverse=True)
    assert set(ends) == {"before", "after"}
