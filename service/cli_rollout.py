"""`learnd rollout` and `learnd audit`: trials by hand, their verdicts decided again, the log of them checked."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.options import ApiKey, AsJson, Config, LineName, Url, Version, client, print_json

if TYPE_CHECKING:
    from service.client import Client

rollout_commands = typer.Typer(help="Trials: candidates on live traffic.", no_args_is_help=True)
audit_commands = typer.Typer(help="The log of what was done and why.", no_args_is_help=True)


@rollout_commands.command()
def status(line: LineName, as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Show the line's last trial with its evidence."""
    with client(url, key, config) as daemon:
        said = daemon.get(f"/api/rollouts/{line}")
    if as_json:
        print_json(said)
        return
    from service import screens

    trial = said["trial"]
    typer.echo(f"{trial['id']}: {trial['candidate']}, {screens.trial(trial)}\n{trial['reason']}" if trial else "no trial yet")
    for told in screens.guardrails(trial) if trial else ():
        typer.echo(told)
    if said.get("anchor"):
        typer.echo(screens.anchor(said["anchor"]))


@rollout_commands.command()
def history(line: LineName, as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """List every verdict on the line's trials, newest first."""
    with client(url, key, config) as daemon:
        said = daemon.get(f"/api/rollouts/{line}/history")
    if as_json:
        print_json(said)
        return
    from service import screens

    screens.show(screens.verdicts(said["data"]))


@rollout_commands.command()
def pause(line: LineName, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Hold the trial: its weight stays, nothing goes forward, harm still rolls it back."""
    _post(f"{line}/pause", None, client(url, key, config))


@rollout_commands.command()
def resume(line: LineName, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Let a held trial go on; you answer for what it was held for."""
    _post(f"{line}/resume", None, client(url, key, config))


@rollout_commands.command()
def abort(line: LineName, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """End the trial, even while it is being promoted; the champion stays."""
    _post(f"{line}/abort", None, client(url, key, config))


@rollout_commands.command()
def promote(line: LineName, version: Version = None, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Make a version the champion: the candidate, unless another is named."""
    _post(f"{line}/promote", {"version": version}, client(url, key, config))


@rollout_commands.command()
def rollback(line: LineName, version: Version = None, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """End the trial, or else go back: to the previous champion, unless another version is named."""
    _post(f"{line}/rollback", {"version": version}, client(url, key, config))


@rollout_commands.command()
def anchor(
    line: LineName,
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="Such as v7, or base.")] = "champion",
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Trust a version, the champion unless another is named: the line is compared with it from now on, and is not frozen."""
    _post(f"{line}/anchor", {"version": version}, client(url, key, config))


@rollout_commands.command()
def replay(
    what: Annotated[str, typer.Argument(metavar="ID", help="Such as support-trial3, support-job7, support@v7, or a line.")],
    as_json: AsJson = False,
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Decide each verdict on a trial, job, version, anchor's round or line again, as recorded; status 1 when one differs."""
    with client(url, key, config) as daemon:
        said = daemon.get(f"/api/replay/{what}")
    if as_json:
        print_json(said)
    for one in () if as_json else said["data"]:
        again = "asked for by hand" if one["replayed"] is None else "the same again" if one["is_same"] else one["replayed"]
        typer.echo(f"{one['seq']}  {one['recorded']}  |  {again}{'' if one['is_same_code'] else ', by other code'}")
    if not all(one["is_same"] for one in said["data"]):
        raise typer.Exit(1)


class Mode(StrEnum):
    """How far the kill switch is thrown."""

    OFF = "off"
    FREEZE_PROMOTION = "freeze_promotion"
    FREEZE_TRAINING = "freeze_training"
    BASE_ONLY = "base_only"


def switch(
    mode: Annotated[Mode | None, typer.Argument(metavar="[MODE]")] = None,
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")] = "",
    url: Url = None,
    key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show the kill switch, or throw it: off, freeze_promotion, freeze_training, base_only; each holds back more."""
    with client(url, key, config) as daemon:
        told = {"mode": mode.value, "reason": reason} if mode else None
        print_json(daemon.post("/api/switch", told) if told else daemon.get("/api/switch"))


@audit_commands.command()
def verify(as_json: AsJson = False, url: Url = None, key: ApiKey = None, config: Config = None) -> None:
    """Check that every record is as it was written; status 1 and the first that is not, otherwise."""
    with client(url, key, config) as daemon:
        said = daemon.get("/api/audit")
    if as_json:
        print_json(said)
    elif said["is_whole"]:
        typer.echo(f"{said['records']} records, whole; the last one's digest is {said['head']}")
    else:
        typer.echo(f"record {said['broken']} was changed: {said['reason']}; the {said['records']} before it are whole")
    if not said["is_whole"]:
        raise typer.Exit(1)


def _post(path: str, body: dict[str, Any] | None, connection: Client) -> None:
    with connection as daemon:
        print_json(daemon.post(f"/api/rollouts/{path}", body))
