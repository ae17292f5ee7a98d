"""A daemon small enough to read at a glance: it answers, stores feedback, 'learns' after enough corrections, tries, promotes.

Time passes with each look at its status, not with the clock. Feedback is read by the real reader, so a body that the real
daemon would refuse is refused here.
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from service.api.bodies import FeedbackReader
from service.demo.plan import BASE, settings_text
from service.demo.texts import INSTRUCTIONS, Text
from service.errors import LearndError
from service.settings import Settings

LOOKS = 4
"""Looks at the status that a job takes, and a trial."""


class FakeDaemon:
    """Knows the right answers, and gives them once it has been taught the skill."""

    def __init__(self, texts: list[Text], enough: int, trial_ends: str = "live") -> None:
        self.enough = enough
        self.trial_ends = trial_ends
        self.champion = self.number = 0
        self.skills: dict[int, set[str]] = {0: set()}
        self.job = self.trial = 0
        self.fresh: list[str] = []
        self.trained = self.requests = 0
        self.feedback: dict[str, Any] = {}
        self.asked: dict[str, str] = {}
        self.promotions: list[dict[str, Any]] = []
        self.sessions: set[str] = set()
        self._labels = {text.prompt: text.label for text in texts}
        settings = Settings(**tomllib.loads(settings_text(Path("data"), 8000)))
        self._reader = FeedbackReader(settings.feedback.metrics)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/chat/completions", self.answer, methods=["POST"])
        app.add_api_route("/feedback", self.take, methods=["POST"], response_model=None)
        app.add_api_route("/api/status", self.status)
        app.add_api_route("/api/lines/desk/history", lambda: {"data": self.promotions[::-1]})
        app.add_api_route("/api/jobs/{job}", lambda job: {"id": job, "state": "succeeded"})
        app.add_api_route("/api/trials/{trial}", lambda trial: {"id": trial, "state": self.trial_ends, "reason": "told so"})
        return app

    async def answer(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.requests += 1
        session = request.headers["x-session-id"]
        self.sessions.add(session)
        prompt = body["messages"][0]["content"]
        number = 0 if body["model"] == BASE else self._version_for(session)
        skill = next(name for name, instruction in INSTRUCTIONS.items() if prompt.startswith(instruction))
        content = self._labels[prompt].title() if skill in self.skills[number] else "As an assistant, I"
        reply_id = f"chat-{self.requests}"
        self.asked[reply_id] = prompt
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        model = f"desk@v{number}" if number else BASE
        return {"id": reply_id, "object": "chat.completion", "created": 0, "model": model, "choices": [message]}

    async def take(self, request: Request) -> JSONResponse:
        raw = await request.body()
        try:
            item = self._reader.one(raw, "anonymous", 0.0)
        except LearndError as error:
            return JSONResponse({"error": {"message": error.message}}, 400)
        prompt = self.asked[item.inference_id]
        if item.metric_name == "demonstration":
            assert item.value == self._labels[prompt]
            self.fresh.append(prompt)
        self.feedback[item.id] = json.loads(raw)
        return JSONResponse({"id": item.id, "status": "matched"}, 201)

    def status(self) -> dict[str, Any]:
        self._go_on()
        line = {
            "champion": f"desk@v{self.champion}" if self.champion else None,
            "candidate": f"desk@v{self.number}" if self.trial else None,
            "examples": {"fresh": len(self.fresh), "trained": self.trained},
            "job": {"id": f"job-{self.number}", "state": "running", "step": self.job, "steps": LOOKS} if self.job else None,
            "trial": self._trial() if self.trial else None,
            "last_verdict": {"outcome": "pass", "reasons": [f"gain of {self.number}"]} if self.number else None,
        }
        return {"ready": True, "lines": {"desk": line}, "feedback": {"stored": len(self.feedback), "pending": 0}}

    def _version_for(self, session: str) -> int:
        is_candidate = hashlib.sha256(session.encode()).digest()[0] < 128
        return self.number if self.trial and is_candidate else self.champion

    def _trial(self) -> dict[str, Any]:
        return {
            "id": f"trial-{self.number}",
            "state": "canary",
            "weight": 0.5,
            "units": {"candidate": 9 * self.trial, "control": 8 * self.trial},
            "log_evidence": {"promote": float(self.trial), "rollback": -0.5},
            "thresholds": {"promote": 3.0, "rollback": 4.6},
        }

    def _go_on(self) -> None:
        if self.trial:
            self.trial = (self.trial + 1) % LOOKS
            if not self.trial and self.trial_ends == "live":
                self._promote()
        elif self.job:
            self.job = (self.job + 1) % LOOKS
            if not self.job:
                self.number += 1
                self.skills[self.number] = self.skills[self.champion] | set(self._learned())
                self.trial = 1
        elif len(self.fresh) >= self.enough:
            self.job = 1

    def _learned(self) -> list[str]:
        taken, self.fresh = self.fresh, []
        self.trained += len(taken)
        return [name for name, said in INSTRUCTIONS.items() if sum(one.startswith(said) for one in taken) * 2 > len(taken)]

    def _promote(self) -> None:
        old, self.champion = self.champion, self.number
        names = [f"desk@v{n}" if n else None for n in (old, self.number)]
        change = {"alias": "champion", "from": names[0], "to": names[1], "at": time.time(), "reason": "evidence"}
        self.promotions.append({**change, "swap_seconds": 0.5, "feedback_to_live_seconds": 40.0 + self.number})
