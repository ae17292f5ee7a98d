"""What is deployed is right: the unit stops in order, Prometheus scrapes what there is."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from service.settings_file import load

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT = DEPLOY / "learnd.service"


@pytest.fixture
def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(UNIT)
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit():
    done = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    strange = [line for line in said if "is not executable" not in line]  # it is installed elsewhere, or nowhere
    assert not strange


def test_the_unit_runs_the_command_that_there_is(unit):
    command = unit["Service"]["ExecStart"].split()
    assert Path(command[0]).name == "learnd"
    assert command[1:3] == ["serve", "--config"]


def test_only_the_main_process_is_told_to_stop(unit):
    assert unit["Service"]["KillMode"] == "mixed"


def test_there_is_time_to_drain_and_to_seal(unit):
    assert int(unit["Service"]["TimeoutStopSec"]) > 2 * Settings().cluster.drain_seconds


def test_the_unit_s_folders_are_those_of_the_example(unit):
    service = unit["Service"]
    state = Path("/var/lib") / service["StateDirectory"]
    assert load(DEPLOY / "learnd.toml").data_dir.is_relative_to(state)
    assert service["WorkingDirectory"] == str(state)


def test_the_example_is_safe_to_expose():
    settings = load(DEPLOY / "learnd.toml")
    assert settings.keys
    assert all(len(set(key.sha256)) == 1 for key in settings.keys.values()), "a digest of a real key does not belong here"


def test_prometheus_scrapes_the_daemon():
    jobs = {job["job_name"]: job for job in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]}
    http = Settings().http
    assert jobs["learnd"]["static_configs"] == [{"targets": [f"{http.host}:{http.port}"]}]
    assert jobs["learnd"]["metrics_path"] == "/metrics"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
@pytest.mark.parametrize("is_whole", [False, True], ids=["as it is", "with what is commented out"])
def test_promtool_likes_the_file(tmp_path, is_whole):
    text = (DEPLOY / "prometheus.yml").read_text()
    if is_whole:
        text = re.sub(r"^( +)# ( *(?:- )?(?:[a-z_]+:|\{action))", r"\1\2", text, flags=re.MULTILINE)
        assert {"learnd", "ray"} == {job["job_name"] for job in yaml.safe_load(text)["scrape_configs"]}
    file = tmp_path / "prometheus.yml"
    file.write_text(text)
    done = subprocess.run(["promtool", "check", "config", "--syntax-only", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
