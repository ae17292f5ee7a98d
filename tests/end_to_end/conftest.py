"""One real daemon for the whole run: vLLM, Ray and SmolLM2 with two replicas; it needs most of a minute to start."""

import openai
import pytest

from tests.end_to_end.daemon import Daemon

SETTINGS = """
[engine]
replicas = 2
kv_cache_gib = 0.5

[feedback.metrics.thumb]
type = "boolean"
window_seconds = 5

[lines.desk.learning]
strategy = "naive" # the lessons contradict each other: an adapter that rehearses the first would say some of both
learning_rate = 2e-3
epochs = 2
batch_size = 8
accumulation = 1
max_length = 128

[lines.desk.trigger]
min_examples = 40
cooldown_seconds = 0

[lines.desk.gate]
score = "exact_match"
min_items = 5

[lines.desk.rollout]
weights = [0.5]
step_min_units = 5
min_units = 8
"""


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    running = Daemon(tmp_path_factory.mktemp("daemon"), SETTINGS).start()
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0, running.tail()


@pytest.fixture(scope="session")
def client(daemon):
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0, timeout=120)
