"""Every setting of the daemon: one closed tree, read from `learnd.toml`, then `LEARND_*`, then flags.

Values are typed and documented where they stand; `service/settings_file.py` reads them and explains what is wrong with them.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""What a line, a metric or a key may be called."""


class Closed(BaseModel):
    """A table of settings that refuses strangers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class Base(Closed):
    """The base model, as it serves and as it trains."""

    source: str = "builtin:smollm2-135m"
    """`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id."""
    name: str = ""
    """What clients write in `model` to ask the base itself; empty: derived from the source."""
    quantization: Literal["none", "int8", "int4"] = "none"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int = Field(2048, ge=128)
    max_rank: int = Field(16, ge=1)
    max_resident: int = Field(4, ge=2)
    """Adapters held in memory at once by each replica: champion, candidate and previous of each line must fit."""

    @property
    def served_name(self) -> str:
        """The base's own name, without path or prefix."""
        return self.name or self.source.rstrip("/").split(":")[-1].split("/")[-1].lower()


class Engine(Closed):
    """How the base is served."""

    replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] = {}
    """Passed to Ray Serve's `autoscaling_config` as it is; replaces `replicas`."""
    max_num_seqs: int = Field(32, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    threads: int = Field(0, ge=0)
    """OpenMP threads on a CPU; 0: as many as cores."""
    has_grouped_lora: bool = True
    """Use learnd's CPU kernels for LoRA in place of vLLM's."""
    tool_call_parser: str | None = None
    extra_args: tuple[str, ...] = ()
    """More flags for vLLM's own server, as on its command line."""


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


class Learning(Closed):
    """How a line's next adapter is trained."""

    strategy: Literal["naive", "replay"] = "replay"
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    learning_rate: float = Field(2e-4, gt=0)
    epochs: float = Field(2, gt=0)
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(2, ge=1)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(1024, ge=32)
    early_stopping_patience: int = Field(3, ge=0)
    """Evaluations without improvement before training stops; 0: never."""
    replay_capacity: int = Field(5000, ge=0)
    """Examples remembered by each line, over all slices."""
    replay_ratio: float = Field(0.5, ge=0)
    """Remembered examples for each fresh one, under `replay`."""
    seed: int = 0


class Trigger(Closed):
    """When a line learns by itself."""

    min_examples: int = Field(256, ge=1)
    """Admitted examples since the last job."""
    max_age_seconds: float = Field(0, ge=0)
    """Or the oldest untrained example is older than this (and there are at least 16); 0: never."""
    cooldown_seconds: float = Field(600, ge=0)
    """Pause between two jobs of a line."""


class Gate(Closed):
    """What a candidate must show on held-out examples before it meets traffic."""

    score: Literal["exact_match", "likelihood"] = "likelihood"
    """`exact_match`: greedy decoding gives the held-out reply; `likelihood`: mean log-probability of its tokens, in nats."""
    min_gain: float = 0.0
    """The lower bound of the gain on the new examples must exceed this."""
    max_loss: float = Field(0.1, ge=0)
    """An older slice may lose at most this at the lower bound of its difference."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    min_items: int = Field(20, ge=1)
    """Fewer held-out examples make the verdict `inconclusive`."""


class Rollout(Closed):
    """How a candidate is proven on live traffic."""

    metric: str = "thumb"
    weights: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of units that the candidate gets, step by step; each step has a control group of equal size."""
    step_min_units: int = Field(20, ge=1)
    margin: float = Field(0.05, ge=0, lt=1)
    """Non-inferiority margin on the reward in [0, 1], where a missing answer counts one half."""
    alpha_promote: float = Field(0.05, gt=0, lt=1)
    alpha_rollback: float = Field(0.01, gt=0, lt=1)
    min_units: int = Field(100, ge=1)
    """Matured units in each arm before a promotion."""
    min_seconds: float = Field(0, ge=0)
    max_units: int = Field(20_000, ge=1)
    max_seconds: float = Field(604_800, gt=0)
    """Out of time: the trial expires and the champion stays."""
    error_burst: int = Field(5, ge=1)
    """Failed replies of the candidate among its last `error_window` that roll it back at once."""
    error_window: int = Field(50, ge=1)
    verify_seconds: float = Field(300, gt=0)
    """How long replicas may take to load and prove a version."""
    is_automatic: bool = True
    """False: a candidate that has passed waits for `learnd promote`."""


class Line(Closed):
    """A named lineage of adapters over the base."""

    slices: dict[str, str] = {}
    """Slice by the first pattern (a Python regular expression) found in the prompt, unless the client names one."""
    learning: Learning = Learning()
    trigger: Trigger = Trigger()
    gate: Gate = Gate()
    rollout: Rollout = Rollout()


class Training(Closed):
    """Where jobs run."""

    workers: int = Field(1, ge=1)
    is_on_gpu: bool = False
    cpus_per_worker: float = Field(1.0, ge=0)
    threads: int = Field(0, ge=0)
    """Compute threads of a worker; 0: as many as cores."""
    nice: int = Field(10, ge=0, le=19)
    """Training yields to serving by this priority."""
    max_attempts: int = Field(3, ge=1)
    """Deaths before a job is failed with its reason."""


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
    http: Http = Http()
    keys: dict[Name, Key] = {}
    base: Base = Base()
    engine: Engine = Engine()
    recording: Recording = Recording()
    feedback: Feedback = Feedback()
    lines: dict[Name, Line] = {"default": Line()}
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
        if 3 * len(self.lines) > self.base.max_resident:
            raise ValueError(f"base.max_resident {self.base.max_resident} is too small: {len(self.lines)} lines need 3 each")
        for name, line in self.lines.items():
            self._check_line(name, line)
        return self

    def _check_line(self, name: str, line: Line) -> None:
        if line.rollout.metric not in self.feedback.metrics:
            known = ", ".join(sorted(self.feedback.metrics))
            raise ValueError(f"lines.{name}.rollout.metric {line.rollout.metric!r} is not declared in feedback.metrics ({known})")
        if line.learning.rank > self.base.max_rank:
            raise ValueError(f"lines.{name}.learning.rank {line.learning.rank} is over base.max_rank {self.base.max_rank}")
        if name == self.base.served_name or "@" in name:
            raise ValueError(f"a line may not be called {name!r}: it is the base's name or contains '@'")
