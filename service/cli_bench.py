"""`learnd bench`: the measurements that the README's figures come from, run from a clone of the repository."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import typer

FOLDER = Path(__file__).parent.parent / "benchmarks"
"""Scripts that stand alone: a name, flags of its own, `--json` for one last line; not part of an installed package."""


def bench(
    context: typer.Context,
    name: str = typer.Argument("", metavar="[NAME]", help="Which; without one, they are listed. Its flags follow: try --help."),
) -> None:
    """Measure on this machine what the README's figures say."""
    scripts = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}
    if not scripts:
        raise typer.BadParameter("the benchmarks are in the repository, not in the package: run this in a clone")
    if not name:
        for stem, path in scripts.items():
            typer.echo(f"{stem:12} {(ast.get_docstring(ast.parse(path.read_text())) or '').splitlines()[0]}")
        return
    if name not in scripts:
        raise typer.BadParameter(f"there is no benchmark {name!r}; there are {', '.join(scripts)}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(scripts[name]), *context.args])  # in this process: Ctrl-C is the script's own
