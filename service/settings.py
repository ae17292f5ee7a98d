"""Every setting of the daemon: one closed tree, read from `learnd.toml`, then `LEARND_*`, then flags.

Values are typed and documented where they stand; `service/settings_file.py` reads them and explains what is wrong with them.
"""

from __future__ import annotations

import base64
import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from replay.records import Wanted
from service.settings_data import Admission, Closed, Drift, Name
from service.settings_engine import Base, Engine
from service.settings_learning import Learning
from service.settings_line import Anchor, Bake, Gate, Guardrail, Line, Rollout, Shadow, Trigger
from service.settings_training import Training

__all__ = [
    "Admission",
    "Anchor",
    "Bake",
    "Base",
    "Closed",
    "Drift",
    "Engine",
    "Gate",
    "Guardrail",
    "Judge",
    "Key",
    "Learning",
    "Line",
    "Metric",
    "Notice",
    "Rollout",
    "Settings",
    "Shadow",
    "SwitchMode",
    "Training",
    "Trigger",
    "Webhook",
]


SwitchMode = Literal["off", "freeze_promotion", "freeze_training", "base_only"]
"""How far the kill switch is thrown; each holds back what the one before does, and more."""


Notice = Literal["pre-rollout", "rollout", "rollback", "post-rollout", "event"]
"""What webhooks are told of, in Flagger's words: a trial begins, goes a step, goes back, has ended; anything else."""


class Http(Closed):
    """Where the daemon listens."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Larger requests are refused with 413."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the daemon."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Key(Closed):
    """One API key, kept as its digest: `learnd key new` prints a key and its entry."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Literal["infer", "feedback", "admin"], ...]


class Recording(Closed):
    """How interactions are written down."""

    mode: Literal["sync", "background"] = "sync"
    """`sync`: on disk before the reply's last byte leaves; `background`: through a bounded queue."""
    queue_size: int = Field(10_000, ge=1)
    """When the background queue is full, the request waits: nothing is dropped."""


class Metric(Closed):
    """A kind of feedback that clients may send."""

    type: Literal["boolean", "float"]
    optimize: Literal["max", "min"] = "max"
    window_seconds: float = Field(1800, gt=0)
    """How long feedback on an interaction counts as evidence in a trial; later feedback is kept, not tested."""
    minimum: float = 0.0
    maximum: float = 1.0


class Feedback(Closed):
    """What feedback is taken and how long it waits for its interaction."""

    metrics: dict[Name, Metric] = {"thumb": Metric(type="boolean")}
    pending_seconds: float = Field(86_400, gt=0)
    """Feedback whose interaction has not appeared by then is `expired`."""


class Webhook(Closed):
    """An address that is told of what is done."""

    url: str = Field(pattern=r"^https?://[^\s/]")
    secret: SecretStr = SecretStr("")
    """Signs each notice (HMAC-SHA256, Standard Webhooks); empty: unsigned. Best from `LEARND_WEBHOOKS__NAME__SECRET`."""
    types: tuple[Notice, ...] = ("pre-rollout", "rollout", "rollback", "post-rollout", "event")
    max_age_seconds: float = Field(86_400, gt=0)
    """What could not be told for so long is told no more."""

    @field_validator("secret")
    @classmethod
    def _is_key(cls, secret: SecretStr) -> SecretStr:
        if secret.get_secret_value().startswith("whsec_"):
            try:
                base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
            except ValueError:
                raise ValueError("what follows whsec_ must be base64; a secret of any other form is taken as it is") from None
        return secret


class Judge(Closed):
    """Another model that says which of two replies is better, of candidates in the shadow."""

    url: str = Field("", pattern=r"^(https?://.+)?$")
    """Of an OpenAI-compatible server, up to `/v1`; empty: there is no judge."""
    model: str = ""
    key_env: str = ""
    """The environment variable that holds its key; empty: none is sent."""
    criteria: str = "Prefer the reply that is right, answers what was asked, and says no more than is needed."
    timeout_seconds: float = Field(30, gt=0)


class Ledger(Closed):
    """The durable log."""

    group_commit_seconds: float = Field(0.002, ge=0)
    seal_rows: int = Field(50_000, ge=1)
    """Interactions are sealed into Parquet when this many are open."""
    seal_age_seconds: float = Field(3600, gt=0)


class Cluster(Closed):
    """The Ray that the daemon starts or joins."""

    address: str | None = None
    """A running cluster; None: start one on this machine, on loopback only."""
    has_haproxy: bool = True
    drain_seconds: float = Field(30, ge=0)
    """How long running requests may take to finish at shutdown."""


class Logging(Closed):
    """Structured logs, one line an event, never a prompt."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    is_json: bool = False


class Telemetry(Closed):
    """Who may hear of the daemon."""

    is_on: bool = False
    """Usage reports of Ray, vLLM and the hub to their makers."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="LEARND_", env_nested_delimiter="__")

    data_dir: Path = Path("learnd-data")
    kill_switch: SwitchMode = "off"
    """`freeze_promotion`: no trial goes forward; `freeze_training`: nor is anything learned; `base_only`: nor does any adapter
    answer. Rollbacks go on. Of this and `learnd switch` the stricter holds."""
    http: Http = Http()
    keys: dict[Name, Key] = {}
    base: Base = Base()
    engine: Engine = Engine()
    recording: Recording = Recording()
    feedback: Feedback = Feedback()
    lines: dict[Name, Line] = {"default": Line()}
    webhooks: dict[Name, Webhook] = {}
    judge: Judge = Judge()
    training: Training = Training()
    ledger: Ledger = Ledger()
    cluster: Cluster = Cluster()
    logging: Logging = Logging()
    telemetry: Telemetry = Telemetry()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: file, environment and flags are merged by `settings_file.load`."""
        return (init_settings,)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.http.is_loopback and not self.keys:
            raise ValueError(f"http.host {self.http.host!r} is not loopback, so keys are needed: make one with `learnd key new`")
        if self.base.quantization == "fp8" and not self.engine.gpus:
            raise ValueError(
                "base.quantization fp8 is for GPUs: without one the engine would take seconds for each token. "
                'Say "int8", or give the engine a GPU (engine.gpus)'
            )
        needed = sum(3 + (line.rollout.anchor.holdback > 0) for line in self.lines.values())
        if needed > self.base.max_resident:
            told = f"{len(self.lines)} lines need 3 each, and one more with an anchor"
            raise ValueError(f"base.max_resident {self.base.max_resident} is too small: {told}")
        for name, line in self.lines.items():
            self._check_line(name, line)
        return self

    def wanted(self, line: str) -> Wanted:
        """Which opinions a line learns from, as `replay` has it."""
        good = {name: metric.optimize == "max" for name, metric in self.feedback.metrics.items()}
        return self.lines[line].learning.preferences.wanted(good)

    def _check_line(self, name: str, line: Line) -> None:
        asked = {"metric": line.rollout.metric}
        asked |= {f"guardrails.{guard}.metric": one.metric for guard, one in line.rollout.guardrails.items() if one.metric}
        for key, metric in asked.items():
            if metric not in self.feedback.metrics:
                known = ", ".join(sorted(self.feedback.metrics))
                raise ValueError(f"lines.{name}.rollout.{key} {metric!r} is not declared in feedback.metrics ({known})")
        for metric in line.learning.preferences.thumbs:
            if (found := self.feedback.metrics.get(metric)) is None or found.type != "boolean":
                told = f"lines.{name}.learning.preferences.thumbs {metric!r}"
                raise ValueError(f"{told} is no boolean metric of feedback.metrics: only thumbs are learned from")
        if line.learning.rank > self.base.max_rank:
            raise ValueError(f"lines.{name}.learning.rank {line.learning.rank} is over base.max_rank {self.base.max_rank}")
        if self.training.fsdp or self.training.deepspeed:
            self._check_sharding(name, line)
        if strangers := set(line.admission.trusted) - set(self.keys):
            raise ValueError(f"lines.{name}.admission.trusted names no key of `keys`: {', '.join(sorted(strangers))}")
        if name == self.base.served_name or "@" in name:
            raise ValueError(f"a line may not be called {name!r}: it is the base's name or contains '@'")

    def _check_sharding(self, name: str, line: Line) -> None:
        """What works on whole factors does not work on a worker's part of them."""
        wants = line.learning.preferences
        has_opinions = bool(wants.thumbs or wants.corrections or wants.picks)
        if line.learning.strategy not in {"naive", "replay", "joint"} or line.learning.init in {"pissa", "olora"} or has_opinions:
            told = f"strategy {line.learning.strategy!r}, init {line.learning.init!r}{', preferences' * has_opinions}"
            raise ValueError(
                f"lines.{name}.learning ({told}) needs whole factors, which training.fsdp and training.deepspeed share out: "
                "take `naive`, `replay` or `joint` with another init and no preferences, or neither of the two"
            )
