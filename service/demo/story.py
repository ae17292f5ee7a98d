"""An airline's care desk learns two skills, one after the other, while it works: the demo from start to finish.

`run` starts the daemon as a process and lets the story play against it over HTTP, as any client would: customers ask,
agents correct, the daemon learns, tries and promotes by itself. Nothing here tells it to.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from rich.console import Console

from service.demo.agents import Agents
from service.demo.customers import Customers, Stage
from service.demo.daemon import Daemon
from service.demo.outcome import Outcome
from service.demo.plan import LINE, DemoFailed, Plan, settings_text
from service.demo.post import Post
from service.demo.screen import Screen
from service.demo.tally import Tally
from service.demo.texts import Deck, everything
from service.demo.watch import Watch, champion
from service.ingress import free_port

STAGES = (
    (Stage("the desk answers airline tweets", ("airline",), taught="airline"), "v1"),
    (Stage("headlines arrive as well", ("airline", "headlines"), taught="headlines"), "v2"),
)
"""What is asked, and the version that ends the stage when it serves and is measured."""
REQUEST_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose."""

    folder: Path = Path("demo-report")
    """Where the report and the daemon's log go."""
    is_json: bool = False
    is_kept: bool = False
    """Leave the daemon's data directory behind."""
    plan: Plan = field(default_factory=Plan)


def run(options: Options) -> int:
    """Play the demo; returns the exit status: 0 when every promise was kept."""
    from service.demo import report  # matplotlib comes with it

    console = Console(stderr=options.is_json, highlight=False)
    options.folder.mkdir(parents=True, exist_ok=True)
    data = Path(tempfile.mkdtemp(prefix="learnd-demo-"))
    log = options.folder / "daemon.log"
    try:
        outcome = _with_daemon(options, data, log, console)
    except DemoFailed as error:
        console.print(f"the demo failed: {error.message}\nthe daemon's log: {log}\nits data: {data}", style="red")
        return 1
    except KeyboardInterrupt:
        _tidy(options, data)
        raise
    _tidy(options, data)
    status = report.tell(outcome, options.folder, console)
    if options.is_json:
        print(report.last_line(outcome), flush=True)  # noqa: T201 - what --json promises
    return status


def _tidy(options: Options, data: Path) -> None:
    if not options.is_kept:
        shutil.rmtree(data, ignore_errors=True)


def _with_daemon(options: Options, data: Path, log: Path, console: Console) -> Outcome:
    began, port = time.monotonic(), free_port()
    config = options.folder / "learnd.toml"
    config.write_text(settings_text(data, port))
    url = f"http://127.0.0.1:{port}"

    def clock() -> float:
        return time.monotonic() - began

    with Screen(console) as screen, Daemon(config, log) as daemon:
        screen.say(f"starting learnd at {url} with {config}; its log: {log}")
        try:
            return asyncio.run(_play(options.plan, url, daemon, screen, clock))
        except DemoFailed:
            screen.say(f"the daemon's last words:\n{daemon.last_words()}")
            raise
        finally:
            screen.say("stopping the daemon")


async def _play(plan: Plan, url: str, daemon: Daemon, screen: Screen, clock: Callable[[], float]) -> Outcome:
    deck = Deck(await asyncio.to_thread(everything), plan.seed, plan.measured)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http, client:
        watch = Watch(http, clock, lambda: daemon.is_alive)
        return await Story(plan, http, client, deck, watch, screen, clock).play()


class Story:
    """The two stages, played against a daemon that is there."""

    def __init__(
        self,
        plan: Plan,
        http: httpx.AsyncClient,
        client: openai.AsyncOpenAI,
        deck: Deck,
        watch: Watch,
        screen: Screen,
        clock: Callable[[], float],
    ) -> None:
        self.tally = Tally()
        self._plan = plan
        self._watch = watch
        self._screen = screen
        self._clock = clock
        self._post = Post(http)
        agents = Agents(plan, self._post, random.Random(plan.seed + 1))  # noqa: S311 - a simulation, no secret
        self._customers = Customers(plan, client, deck, self.tally, self._post, agents, clock)
        self._title = "the daemon starts"
        self._tasks: list[asyncio.Task[None]] = []

    async def play(self) -> Outcome:
        """Wait for the daemon, play both stages, and ask it what it did; raises `DemoFailed`."""
        began_at = time.time() - self._clock()
        await self._until(lambda: self._watch.is_ready, self._plan.start_seconds)
        self._screen.say("the daemon is ready")
        try:
            async with self._traffic():
                for stage, version in STAGES:
                    await self._until(self._ending(stage, version), self._plan.limit_seconds)
            await self._post.drain()
            return await self._outcome(began_at)
        finally:
            await self._post.close()

    @asynccontextmanager
    async def _traffic(self) -> AsyncIterator[None]:
        """Customers come all the while; at the end each is answered before the door closes."""
        self._customers.stage = STAGES[0][0]
        self._tasks = [asyncio.create_task(self._customers.come()) for _ in range(self._plan.customers_at_once)]
        try:
            yield
        finally:
            self._customers.stage = None
            await asyncio.gather(*self._tasks)

    def _ending(self, stage: Stage, version: str) -> Callable[[], bool]:
        self._customers.stage, self._title = stage, stage.title
        self._screen.say(f"{stage.title}; agents correct {stage.taught}")
        needed = [(skill, version) for skill in stage.skills] + [(stage.taught, "base")]

        def has_ended() -> bool:
            is_measured = all(self.tally.score(*one).asked >= self._plan.measured for one in needed)
            return champion(self._watch.line) == version and is_measured

        return has_ended

    async def _until(self, is_done: Callable[[], bool], limit_seconds: float) -> None:
        """Watch and show, until it is done; the limit counts from the demo's beginning."""
        while True:
            for one in await self._watch.look():
                self._screen.say(one)
            self._customers.pace.load = self._plan.training_load if self._watch.is_training else None
            self._screen.show(self._title, self._watch.line, self.tally, self._post.acknowledged)
            if is_done():
                return
            if self._clock() > limit_seconds:
                raise DemoFailed(f"{limit_seconds:.0f} s are over while {self._title}")
            for task in self._tasks:
                if task.done():
                    task.result()  # a customer ends early only by a bug: raise it here, not at the end
            await asyncio.sleep(self._plan.poll_seconds)

    async def _outcome(self, began_at: float) -> Outcome:
        status = await self._watch.fetch("/api/status")
        history = await self._watch.fetch(f"/api/lines/{LINE}/history")
        if status is None or history is None:
            raise DemoFailed("the daemon does not say at the end what it did")
        changes = [one for one in history["data"] if one["alias"] == "champion" and one.get("to")]
        return Outcome(
            tally=self.tally,
            evidence=self._watch.evidence,
            promotions=sorted(changes, key=lambda one: float(one["at"])),
            feedback_acknowledged=self._post.acknowledged,
            feedback_refused=self._post.refused,
            feedback_stored=status["feedback"]["stored"],
            examples_trained=status["lines"][LINE]["examples"]["trained"],
            seconds=self._clock(),
            began_at=began_at,
        )
