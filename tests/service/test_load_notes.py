"""Notes of loads that outlive who made them: true processes die here, by themselves."""

import subprocess
import sys

import pytest

from service.errors import EngineCrash, NotReady
from service.load_notes import LoadNotes

NAME = "desk@v2"
DIES = """
import os, pathlib, sys
from service.load_notes import LoadNotes
with LoadNotes(pathlib.Path(sys.argv[1])).noted("desk@v2", "r1"):
    print(flush=True)
    sys.stdin.readline()
    os._exit(9)
"""


@pytest.fixture
def notes(tmp_path):
    return LoadNotes(tmp_path)


def load(notes):
    with notes.noted(NAME, "r1"):
        pass


def begun(folder):
    """A process that is in the midst of a load, and dies when it hears something."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", DIES, str(folder)], **pipes)
    process.stdout.readline()
    return process


def die(*processes):
    for process in processes:
        process.communicate(b"now\n")
        assert process.returncode == 9


def test_a_process_that_dies_leaves_its_note_and_two_in_a_row_are_enough(notes, tmp_path):
    die(begun(tmp_path))
    die(begun(tmp_path))
    with pytest.raises(EngineCrash, match="died 2 times in a row"):
        load(notes)


def test_who_loads_at_the_same_time_dies_once(notes, tmp_path):
    die(*[begun(tmp_path) for _ in range(3)])
    load(notes)


def test_who_still_loads_is_not_dead(notes, tmp_path):
    die(begun(tmp_path))
    second = begun(tmp_path)
    third = begun(tmp_path)  # the same try as the second: nobody has died of it yet
    die(second, third)
    with pytest.raises(EngineCrash):
        load(notes)


def test_what_went_well_begins_anew(notes, tmp_path):
    for _ in range(3):
        die(begun(tmp_path))
        load(notes)


def test_only_the_engine_s_death_is_a_death(notes):
    for _ in range(3):
        with pytest.raises(ValueError, match="unreadable"), notes.noted(NAME, "r1"):
            raise ValueError("unreadable")
    for _ in range(2):
        with pytest.raises(NotReady), notes.noted(NAME, "r1"):
            raise NotReady("the engine is dead")
    with pytest.raises(EngineCrash):
        load(notes)
    with notes.noted("desk@v1", "r1"):
        pass  # each version for itself


def test_what_cannot_be_noted_is_loaded_all_the_same(tmp_path):
    (tmp_path / "loading").write_text("no folder")
    load(LoadNotes(tmp_path / "loading"))
