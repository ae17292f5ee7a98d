"""What the house style can hold by machine: the arrow of imports, the doors, the sizes, the words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("replay", "learners", "service")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DOORS = {
    "ray": {"service/deployments.py", "service/remote.py", "learners/remote.py"},
    "vllm": {
        "service/engines/vllm.py",
        "service/engines/vllm_cpu.py",
        "service/engines/vllm_cpu_layers.py",
        "service/engines/vllm_cpu_threads.py",
        "service/engines/vllm_rows.py",
    },
    "peft": {"learners/adapter.py"},
    "trl": {"learners/trainer.py", "learners/preference.py"},
    "accelerate": {"learners/sharding.py"},
    "prometheus_client": {"service/metrics.py", "service/metrics_lines.py"},
    "sqlalchemy": {
        "replay/",
        "service/registry.py",
        "service/audit.py",
        "service/switch.py",
        "service/anchoring.py",
        "service/bisecting.py",
        "service/rollout/trials.py",
        "service/rollout/watches.py",
        "service/jobs.py",
        "service/lineage.py",
        "service/conductor.py",
        "service/journal.py",
        "service/training.py",
        "service/transitions.py",
        "service/storage.py",
        "service/status.py",
        "service/drift.py",
        "service/quarantine.py",
        "service/queueing.py",
        "service/comparing.py",
        "service/judging.py",
        "service/webhooks.py",
    },
    "datasketch": {"replay/similarity.py"},
    "phonenumbers": {"replay/privacy.py"},
    "stdnum": {"replay/privacy.py"},
    "river": {"service/drift.py"},
    "torch": {"learners/", "service/engines/"},
    "transformers": {"learners/", "service/engines/"},
}
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "manager.py", "misc.py"}
MAX_MODULE, MAX_FUNCTION, P90_FUNCTION = 300, 60, 30


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found.add(node.module or "")
    return found


def functions(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    rank = {"replay": 0, "learners": 1, "service": 2}
    mine = rank[path.relative_to(ROOT).parts[0]]
    for module in imports(path):
        root = module.split(".")[0]
        assert rank.get(root, -1) <= mine, f"{name(path)} imports {module}: the arrow is replay <- learners <- service"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_things_have_one_door(path):
    for module in imports(path):
        doors = DOORS.get(module.split(".")[0])
        allowed = doors is None or any(
            name(path) == door or (door.endswith("/") and name(path).startswith(door)) for door in doors
        )
        assert allowed, f"{name(path)} imports {module}; its doors are {sorted(doors or ())}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_sizes(path):
    assert path.name not in FORBIDDEN_NAMES
    assert len(path.read_text().splitlines()) <= MAX_MODULE, f"{name(path)} is over {MAX_MODULE} lines"
    assert not [f for f in functions(path) if f[1] > MAX_FUNCTION], f"{name(path)}: functions over {MAX_FUNCTION} lines"


def test_functions_are_short():
    lengths = sorted(length for path in FILES for _, length in functions(path))
    assert lengths[int(0.9 * len(lengths))] <= P90_FUNCTION


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name(path)} has no opening docstring"


def test_the_command_line_is_light():
    heavy = ("torch", "ray", "vllm", "transformers", "pandas", "matplotlib", "openai", "sqlalchemy", "pyarrow")
    code = f"import sys, service.cli; print([m for m in {heavy!r} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"
