"""`learnd bench`: what it lists, what it runs, what it says when there is nothing to run."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import cli, cli_bench

REAL = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    return tmp_path


def learnd(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *arguments])


def test_it_lists_the_scripts_with_their_first_lines(folder):
    (folder / "speed.py").write_text('"""How fast it is.\n\nMore words.\n"""\n')
    (folder / "_shared.py").write_text('"""No benchmark."""\n')
    assert learnd().stdout.split("\n") == ["speed        How fast it is.", ""]


def begun(folder, *arguments):
    """`learnd bench` in a process of its own, which becomes the script."""
    here = "import sys, pathlib; from service import cli, cli_bench; cli_bench.FOLDER = pathlib.Path(sys.argv.pop(1)); cli.app()"
    return subprocess.Popen([sys.executable, "-c", here, folder, "bench", *arguments], stdout=subprocess.PIPE, text=True)


def test_the_flags_and_the_exit_status_are_the_script_s(folder):
    (folder / "speed.py").write_text('"""x"""\nimport sys\nprint(sys.argv[1:])\nsys.exit(3)\n')
    with begun(folder, "speed", "--quick", "--out", "here") as process:
        assert ast.literal_eval(process.communicate()[0]) == ["--quick", "--out", "here"]
    assert process.returncode == 3


def test_a_script_that_is_interrupted_has_the_time_to_end_what_it_began(folder):
    (folder / "slow.py").write_text(
        '"""x"""\nimport time\ntry:\n    print("begun", flush=True)\n    time.sleep(60)\n'
        'except KeyboardInterrupt:\n    time.sleep(1)\n    print("ended")\n'
    )
    with begun(folder, "slow") as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "ended\n"


def test_an_unknown_name_is_told_what_there_is(folder):
    (folder / "speed.py").write_text('"""x"""\n')
    told = learnd("sped")
    assert told.exit_code == 2
    assert "speed" in told.output


def test_an_installed_package_has_none(folder):
    told = learnd()
    assert told.exit_code == 2
    assert "clone" in told.output


def test_every_script_says_what_it_is():
    for path in REAL.glob("[!_]*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].endswith(".")
