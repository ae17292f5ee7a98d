"""The `learnd` command: each verb reads its arguments, does one thing through one door, and prints what came of it.

Imports stay inside the commands, so that `learnd --help` answers at once. Commands about a running daemon talk HTTP to it,
like any client. Errors of ours become one line on stderr and status 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from service import cli_base, cli_bench, cli_quarantine, cli_rollout
from service.options import ApiKey, AsJson, Config, LineName, Url, client, print_json, settings

app = typer.Typer(
    help="A daemon that serves a language model and learns from the feedback on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
feedback_commands = typer.Typer(help="Feedback from files.", no_args_is_help=True)
key_commands = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(feedback_commands, name="feedback")
app.add_typer(cli_base.base_commands, name="base")
app.add_typer(key_commands, name="key")
app.add_typer(cli_rollout.rollout_commands, name="rollout")
app.add_typer(cli_quarantine.quarantine_commands, name="quarantine")
app.add_typer(cli_rollout.audit_commands, name="audit")
app.command()(cli_rollout.switch)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(cli_bench.bench)


class Scope(StrEnum):
    """What a key may do."""

    INFER = "infer"
    FEEDBACK = "feedback"
    ADMIN = "admin"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `learnd`."""
    from service.errors import LearndError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="learnd")
    except LearndError as error:
        typer.echo(f"learnd: {error.message}", err=True)
        sys.exit(1)


@app.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Where to listen.")] = None,
    port: Annotated[int | None, typer.Option(help="Where to listen.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join.")] = None,
) -> None:
    """Run the daemon in the foreground; Ctrl-C stops it in order."""
    given = settings(config, _given(host=host, port=port, data_dir=data_dir, address=address))
    from service.app import serve as run

    run(given)


@app.command()
def status(as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Show lines, versions, feedback, the running job and the trial on one screen."""
    with client(url, key, config) as daemon:
        said = daemon.get("/api/status")
    if as_json:
        print_json(said)
        return
    from service import screens

    screens.show(screens.status(said))


@app.command()
def versions(line: LineName, as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """List a line's versions with their scores."""
    with client(url, key, config) as daemon:
        said = daemon.get(f"/api/lines/{line}/versions")
    if as_json:
        print_json(said)
        return
    from service import screens

    screens.show(screens.versions(line, said["data"]))


@app.command()
def examples(line: LineName, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Print what a line has to learn from, one JSON object a line: for `learnd base tune`, and for your own eyes."""
    import json

    with client(url, key, config) as daemon:
        for row in daemon.get(f"/api/lines/{line}/examples")["data"]:
            typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def train(
    line: LineName,
    bisect: Annotated[str | None, typer.Option(metavar="JOB", help="Search this job for the examples that do harm.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Of this job alone; `joint`: all again, also if nothing is new.")] = None,
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Start a learning job now, whatever the triggers say; or train on parts of one whose candidate lost a slice."""
    if bisect and strategy:
        raise typer.BadParameter("a search trains as the job did: leave out --strategy")
    body = {"strategy": strategy} if strategy else None
    with client(url, key, config) as daemon:
        print_json(daemon.post(f"/api/jobs/{bisect}/bisect" if bisect else f"/api/lines/{line}/train", body))


app.command()(cli_rollout.promote)
app.command()(cli_rollout.rollback)


@feedback_commands.command("import")
def import_feedback(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="NDJSON: one body of /feedback a line.")],
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Send a file of feedback; each line is acknowledged or refused by its number. Safe to repeat when lines have ids."""
    from service import importing

    with client(url, key, config) as daemon:
        done = importing.send(file, daemon)
    typer.echo(f"{done.stored} stored, {done.repeated} known before, {done.pending} wait, {done.refused} refused")
    if done.refused:
        raise typer.Exit(1)


@key_commands.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Who will use it; shows in records and logs.")],
    scope: Annotated[list[Scope] | None, typer.Option(help="What it may do; repeat for more.")] = None,
) -> None:
    """Make an API key: prints it once, and the settings that let it in (a digest only)."""
    import hashlib
    import re
    import secrets

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise typer.BadParameter("use small letters, digits, '-' and '_', at most 63")
    key = f"learnd-{secrets.token_urlsafe(32)}"
    scopes = ", ".join(f'"{one}"' for one in scope or [Scope.INFER, Scope.FEEDBACK])
    typer.echo(f"{key}\n\n[keys.{name}]")
    typer.echo(f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\nscopes = [{scopes}]')


@app.command()
def webhook(
    name: Annotated[str, typer.Argument(help="Of [webhooks.NAME] in the settings.")],
    config: Config = None,
) -> None:
    """Send a test notice to a webhook, and say whether it was taken."""
    import time

    from service import webhooks
    from service.errors import NotFound

    known = settings(config, {}).webhooks
    if name not in known:
        raise NotFound(f"no webhook {name!r} in the settings; there is {', '.join(known) or 'none'}", param="name")
    webhooks.test(known[name], name, time.time())
    typer.echo(f"{name} took the notice")


@app.command()
def doctor(as_json: AsJson = False, config: Config = None) -> None:
    """Check the machine, the environment, ports, disk and the model; say what to do."""
    from dataclasses import asdict

    from service import doctor as checks

    found = checks.examine(settings(config, {}))
    if as_json:
        print_json({"checks": [asdict(one) for one in found]})
    else:
        from service import screens

        screens.show(screens.checks(found))
    if any(one.level == "fail" for one in found):
        raise typer.Exit(1)


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as one last line of JSON.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the report and the daemon's log go.")] = Path("demo-report"),
    is_kept: Annotated[bool, typer.Option("--keep", help="Leave the daemon's data directory behind.")] = False,
) -> None:
    """Watch a care desk learn two skills while it works."""
    from service.demo.story import Options, run

    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` has it ignored: the daemon must not stay behind
        signal.signal(number, signal.default_int_handler)
    try:
        raise typer.Exit(run(Options(folder=folder, is_json=as_json, is_kept=is_kept)))
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


def _given(host: str | None, port: int | None, data_dir: Path | None, address: str | None) -> dict[str, Any]:
    """Flags as a part of the tree of settings, those left out left out."""
    flags: dict[str, Any] = {
        "http": {name: value for name, value in (("host", host), ("port", port)) if value is not None},
        "cluster": {"address": address} if address else {},
        "data_dir": data_dir,
    }
    return {name: value for name, value in flags.items() if value}


if __name__ == "__main__":
    main()
