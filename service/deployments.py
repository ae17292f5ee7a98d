"""The door to Ray: the cluster, the keeper's actor, and the two Serve deployments.

`service.remote` has the keeper's far side and the jobs.

Nothing is decided here. Each part is built from plain classes that know no Ray (`Keeper`, `Gateway`, `Residency`,
`api.build`), wrapped, named and placed. `service.app` calls it all in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learners.base import BaseMissing, BaseModel, preparing, refuse_another, refuse_floats
from service.api import build
from service.artifacts import validator
from service.engines.base import Engine
from service.errors import BaseUnavailable, SettingsError
from service.gateway import Gateway
from service.keeper import Keeper
from service.load_notes import FOLDER, LoadNotes
from service.logs import configure
from service.remote import KEEPER, NAMESPACE, RayLauncher, RemoteKeeper
from service.residency import Residency
from service.settings import Settings
from service.shadowing import Shadower

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
"""Serve's own logs: requests are in ours, one line each."""

# The cluster.


def start_cluster(settings: Settings) -> None:
    """Start a Ray on this machine's loopback, or join the one at `cluster.address`; no usage reports either way.

    Raises `SettingsError` when there is none to join.
    """
    where: dict[str, Any] = {"address": settings.cluster.address}
    if settings.cluster.address is None:
        cpus = max(os.cpu_count() or 1, _cpus_needed(settings))
        where = {"address": "local", "num_cpus": cpus, "include_dashboard": False}  # without it, any Ray here would be joined
    try:
        ray.init(namespace=NAMESPACE, log_to_driver=settings.logging.level == "debug", logging_level="error", **where)
    except ConnectionError as error:
        raise SettingsError(
            f"{error}: start one with `ray start --head`, give its token (RAY_AUTH_MODE=token) or leave cluster.address out"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # in this process: the terminal is the daemon's own
    options = HTTPOptions(host=settings.http.host, port=settings.http.port)
    serve.start(http_options=options, logging_config=QUIET)


def stop_cluster(settings: Settings) -> None:
    """Stop the Ray that we started, and Serve with it; a joined one keeps running, with its Serve stopped."""
    if settings.cluster.address is not None and ray.is_initialized():
        with contextlib.suppress(Exception):  # the daemon is leaving: what cannot be stopped dies with the session
            serve.shutdown()
    ray.shutdown()


def _cpus_needed(settings: Settings) -> int:
    """Logical CPUs for all that runs at once: Ray counts places, not cores, and the kernel shares the cores."""
    replicas = max(settings.engine.replicas, int(settings.engine.autoscaling.get("max_replicas", 1)))
    return int(replicas * settings.engine.cpus + settings.training.workers * settings.training.cpus_per_worker) + 2


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator] # ray is untyped
def _prepare(settings: Settings) -> Iterator[str | BaseModel]:
    for told in preparing(settings.base.source, settings.base.quantization):
        if isinstance(told, BaseModel):
            refuse_another(told, settings.data_dir / "versions")
            if not settings.engine.gpus:
                refuse_floats(told)
        yield told


def prepare(settings: Settings, say: Callable[[str], None]) -> BaseModel:
    """The base of all versions so far, made ready where the replicas run and not in this process, which stays small.

    Quantizing takes minutes, so `say` is told of each step. Raises `BaseUnavailable`.
    """
    try:
        for step in _prepare.remote(settings):
            told: str | BaseModel = ray.get(step)
            if isinstance(told, BaseModel):
                return told
            say(told)
    except RayTaskError as error:
        raise BaseUnavailable(str(error.cause)) if isinstance(error.cause, BaseMissing) else error.cause from None
    raise BaseUnavailable("preparing the base ended without a base: see Ray's logs of this session")


# The keeper.


class KeeperActor:
    """The keeper in a process of its own; it starts at the first call, also after a crash."""

    def __init__(self, settings: Settings, base: BaseModel) -> None:
        configure(settings.logging)
        self._keeper = Keeper(settings, base, RayLauncher(settings))
        self._starting: asyncio.Task[None] | None = None

    async def call(self, verb: str, *arguments: Any) -> Any:
        """One method of `KeeperDoor`, by name: the callers are `RemoteKeeper`'s own methods."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._keeper.start())
        await asyncio.shield(self._starting)
        return await getattr(self._keeper, verb)(*arguments)

    async def close(self) -> None:
        """Finish what is written, seal, let go of the database."""
        if self._starting is not None:
            await self._starting
            await self._keeper.close()


def start_keeper(settings: Settings, base: BaseModel) -> ActorHandle:
    """Start the keeper's actor, which lives as long as its handle is held.

    Ray starts it again whenever it dies, always on this node: its database has only ever one machine's locks.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(KeeperActor).options(
        name=KEEPER,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=2000,
        scheduling_strategy=here,
    )
    return actor.remote(settings, base)


def stop_keeper(keeper: ActorHandle, timeout_seconds: float) -> None:
    """Close the keeper in order."""
    with contextlib.suppress(GetTimeoutError, RayActorError):  # its database is safe at any instant
        ray.get(keeper.close.remote(), timeout=timeout_seconds)
    ray.kill(keeper)


# The two applications.


@serve.deployment(
    name="control", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, logging_config=QUIET
)
@serve.ingress()
class Control:
    """`/`: feedback, administration, metrics, health. It answers while engines start or restart."""

    def __init__(self, settings: Settings) -> None:
        configure(settings.logging)
        _stay_home(settings)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        """The control app over the remote keeper."""
        return build(RemoteKeeper(), self._settings)


@serve.deployment(
    name="engine",
    max_ongoing_requests=1000,
    health_check_period_s=5,
    graceful_shutdown_wait_loop_s=0.5,
    logging_config=QUIET,
)
@serve.ingress()
class EngineReplica:
    """`/v1`: vLLM's own app behind the gateway, and the loop that keeps this replica's adapters as desired."""

    async def __init__(self, settings: Settings, base: BaseModel) -> None:  # type: ignore[misc] # Serve awaits it
        from service.engines.vllm import VllmEngine  # torch: in the replica's process only

        configure(settings.logging)
        _stay_home(settings)
        keeper = RemoteKeeper()
        replica = serve.get_replica_context().replica_id.unique_id
        self._engine: Engine = await VllmEngine.start(settings, base)
        validate = validator(base, settings.base.max_rank)
        notes, name = LoadNotes(settings.data_dir / FOLDER), settings.base.served_name
        self._residency = Residency(self._engine, keeper, replica, base_name=name, validate=validate, notes=notes)
        await self._residency.start()
        self._shadower = Shadower(self._engine, self._residency, keeper, replica)
        self._gateway = Gateway(self._engine, self._residency, keeper, settings, shadower=self._shadower)
        self._loop = asyncio.create_task(self._residency.run())
        self._shadows = asyncio.create_task(self._shadower.run())

    def __serve_build_asgi_app__(self) -> Any:
        """The gateway in front of vLLM's app."""
        return self._gateway

    async def check_health(self) -> None:
        """Raise when the engine died or the residency loop ended: Serve then replaces this replica."""
        await self._engine.check()
        if self._loop.done():
            self._loop.result()
            raise RuntimeError("the residency loop has ended")

    async def shutdown(self) -> None:
        """Record what is queued, then let the engine go."""
        self._shadows.cancel()
        self._shadower.close()
        await self._gateway.close()
        self._loop.cancel()
        await self._engine.close()

    __del__ = shutdown  # Serve awaits a replica's destructor after it has drained


def _stay_home(settings: Settings) -> None:
    """Keep this replica's port for calls between deployments on loopback, where our own Ray has its others.

    Ray binds it to every interface and has no setting for it.
    """
    if settings.cluster.address is not None:
        return
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def run_apps(settings: Settings, base: BaseModel) -> None:
    """Serve the control app at `/` and the engine at `/v1`; returns when its replicas hold their champions and answer.

    They start side by side: feedback is taken while the engine still loads.
    """
    serve.run_many(
        [
            serve.RunTarget(cast("Any", Control).bind(settings), name="control", route_prefix="/"),
            serve.RunTarget(_engine(settings).bind(settings, base), name="engine", route_prefix="/v1"),
        ]
    )


def _engine(settings: Settings) -> Any:
    """The engine's deployment as the settings want it: so many replicas, on such resources."""
    spec = settings.engine
    scale: dict[str, Any] = {"autoscaling_config": spec.autoscaling} if spec.autoscaling else {"num_replicas": spec.replicas}
    return cast("Any", EngineReplica).options(
        ray_actor_options={
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "runtime_env": {"env_vars": _engine_env(settings)},
        },
        graceful_shutdown_timeout_s=settings.cluster.drain_seconds,
        **scale,
    )


def stop_apps() -> None:
    """Take no new requests, drain the running ones within their deadline, then stop the control app."""
    serve.delete("engine")
    serve.delete("control")


def _engine_env(settings: Settings) -> dict[str, str]:
    """What must be set before the replica's process starts; the rest vLLM's own page sets."""
    spec = settings.engine
    variables = {
        "OMP_NUM_THREADS": str(spec.threads or os.cpu_count() or 1),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # weights in huge pages: on CPUs each token reads all of them
    }
    if spec.replicas > 1 or spec.autoscaling:
        variables["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while they wait take the cores that replicas share
    return variables
