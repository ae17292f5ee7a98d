"""What is written is true: examples load, links lead somewhere, the tree and the reference tables are whole."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.metrics import Metrics
from service.settings import Closed, Settings
from service.settings_file import load

ROOT = Path(__file__).parent.parent
PACKAGES = ("replay", "learners", "service")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPERATIONS = ROOT / "docs" / "operations.md"
SAID_ELSEWHERE = {"webhooks", "keys", "feedback.metrics", "lines", "lines.NAME.rollout.guardrails"}
"""Tables whose entries the user names: their keys stand in the reference under `NAME`."""


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page, language):
    """Fenced blocks of one language; a first line `# excerpt` marks one that is no whole file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def toml_examples():
    files = [(name(path), path.read_text()) for path in sorted((ROOT / "deploy").glob("*.toml"))]
    written = [(f"{name(page)}-{i}", text) for page in PAGES for i, text in enumerate(blocks(page, "toml"), 1)]
    return [pytest.param(text, id=where) for where, text in files + written]


@pytest.mark.parametrize("text", toml_examples())
def test_each_example_of_settings_loads(text, tmp_path):
    file = tmp_path / "learnd.toml"
    file.write_text(text)
    assert load(file) is not None


def test_the_readme_has_a_first_config():
    (first, *_) = blocks(ROOT / "README.md", "toml")
    assert tomllib.loads(first)["lines"]


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)} links to {target}"


def tree():
    """The paths in the README's tree."""
    (text,) = blocks(ROOT / "README.md", "text")
    folders, found = [], set()
    for line in text.splitlines():
        entry = re.match(r"( *)(\S+)", line)
        depth = len(entry[1]) // 2
        del folders[depth:]
        path = "/".join([*folders, entry[2].rstrip("/")])
        found.add(path)
        if entry[2].endswith("/"):
            folders.append(entry[2].rstrip("/"))
    return found


def test_everything_in_the_tree_exists():
    assert not [path for path in tree() if not (ROOT / path).exists()]


def test_every_file_of_the_packages_is_in_the_tree():
    files = {name(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    files = {path for path in files if not path.endswith("__init__.py")}
    assert files <= tree(), f"add to the README's tree: {sorted(files - tree())}"


def settings(model=Settings, prefix=""):
    """Each setting's dotted key with its default, a dictionary's entries under `NAME`."""
    for key, field in model.model_fields.items():
        dotted, kind = f"{prefix}{key}", field.annotation
        if isinstance(kind, type) and issubclass(kind, Closed):
            yield from settings(kind, f"{dotted}.")
        elif dotted in SAID_ELSEWHERE:
            yield from settings(kind.__args__[1], f"{dotted}.NAME.")
        else:
            yield dotted, "required" if field.is_required() else "found" if field.default_factory else written(field.default)


def written(value):
    """A default as TOML has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr):
        return written(value.get_secret_value())
    if isinstance(value, tuple):
        return f"[{', '.join(written(one) for one in value)}]"
    return f'"{value}"' if isinstance(value, str | Path) else "{}" if value == {} else str(value)


def rows(page, heading):
    """The first cells of the rows of the tables under a heading, without their ticks."""
    section = re.split(rf"^## {heading}$", page.read_text(), flags=re.MULTILINE)[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip("` ") for cell in row] for row in cells]


def test_the_settings_reference_is_whole_and_right():
    told = {row[0]: row[1] for row in rows(OPERATIONS, "Settings")}
    assert told == dict(settings())


def test_every_metric_is_explained():
    told = {row[0] for row in rows(OPERATIONS, "Metrics")}
    registry = Metrics("0", "base")._registry
    real = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    assert told == real


def test_decisions_are_numbered_and_have_their_three_parts():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{i:04d}" for i in range(1, len(pages) + 1)]
    for page in pages:
        heads = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert heads == ["Context", "Choice", "Cost"], name(page)


def test_the_changelog_names_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_demo_s_settings_are_a_first_config_too(tmp_path):
    from service.demo.plan import settings_text

    file = tmp_path / "learnd.toml"
    file.write_text(settings_text(tmp_path, 8000))
    assert "desk" in load(file).lines
