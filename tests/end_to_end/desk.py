"""The desk of the end-to-end tests: customers who ask, agents who teach a colour, and what the daemon says of itself."""

import itertools
import threading
import time
from typing import NamedTuple

import httpx
import openai

COLOURS = ("red", "blue")
"""Lessons that are opposite on purpose, so that each reply shows which adapter made it."""

PAUSE_SECONDS = 0.5
"""Between two questions of a customer while a job trains."""

SETTINGS = """
[feedback.metrics.thumb]
type = "boolean"
window_seconds = 5

[lines.desk.learning]
strategy = "naive" # the lessons contradict each other: an adapter that rehearses the first would say some of both
learning_rate = 2e-3
epochs = 3
batch_size = 8
accumulation = 1
max_length = 128

[lines.desk.trigger]
min_examples = 40
cooldown_seconds = 0

[lines.desk.gate]
score = "exact_match"
min_items = 5
max_loss = 1 # the second lesson unteaches the first on purpose

[lines.desk.rollout]
weights = [0.5]
step_min_units = 5
min_units = 8
bake = {holdback = 0} # each reply after a promotion is to be the new champion's

[lines.desk.rollout.guardrails.error]
kind = "error"
margin = 0.5 # shown by a dozen pairs without an error
"""


class Reply(NamedTuple):
    """What was asked (the number of its item), which version the reply names, and what it says."""

    number: int
    model: str
    said: str


class Traffic(threading.Thread):
    """Customers who ask all the while, thumb each reply by whether it names the wanted colour, and note what failed.

    They come less often while a job trains: on two cores they would take its time away.
    """

    def __init__(self, client, daemon):
        super().__init__(daemon=True)
        self.client, self.url = client, daemon.url
        self.wanted = COLOURS[0]
        self.replies, self.failures = [], []
        self.done = threading.Event()
        self.pause = 0.0
        self.numbers = itertools.count()

    def run(self):
        while not self.done.is_set():
            number = next(self.numbers)
            try:
                self.ask(number)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
                time.sleep(0.1)
            self.done.wait(self.pause)

    def ask(self, number):
        who = {"x-session-id": f"customer-{number}"}
        reply = self.client.chat.completions.create(
            model="desk", messages=question(number), max_tokens=6, temperature=0, extra_headers=who
        )
        said = reply.choices[0].message.content
        self.replies.append(Reply(number, reply.model, said))
        thumb = {"inference_id": reply.id, "metric_name": "thumb", "value": self.wanted in said.lower()}
        httpx.post(f"{self.url}/feedback", json=thumb).raise_for_status()


def question(number):
    return [{"role": "user", "content": f"What is the colour of item {number}?"}]


def teach(client, url, colour, numbers):
    for number in numbers:
        asked = client.chat.completions.create(model="desk", messages=question(number), max_tokens=4, temperature=0)
        body = {"inference_id": asked.id, "metric_name": "demonstration", "value": colour, "id": f"{colour}-{number}"}
        httpx.post(f"{url}/feedback", json=body).raise_for_status()


def desk(url):
    """The line as the daemon's status tells it."""
    return httpx.get(f"{url}/api/status", timeout=30).json()["lines"]["desk"]


def paced(url, traffics):
    """The line's status, after the customers have been told whether a job trains."""
    line = desk(url)
    for traffic in traffics:
        traffic.pause = PAUSE_SECONDS if line["job"] else 0.0
    return line


def champion(url):
    return desk(url)["champion"]


def wait_for(what, seconds, describe, every=0.5):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, describe()
        time.sleep(every)


def ask(client, model="desk", number=77):
    return client.chat.completions.create(model=model, messages=question(number), max_tokens=6, temperature=0)
