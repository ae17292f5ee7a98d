"""One real daemon for the whole run: vLLM, Ray and SmolLM2 with two replicas; it needs most of a minute to start."""

import openai
import pytest

from tests.end_to_end.daemon import Daemon
from tests.end_to_end.desk import SETTINGS

TWO_REPLICAS = """
[engine]
replicas = 2
kv_cache_gib = 0.5
tool_call_parser = "hermes"
"""


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    running = Daemon(tmp_path_factory.mktemp("daemon"), TWO_REPLICAS + SETTINGS).start()
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0, running.tail()
        assert running.tail().endswith("stopped\n")
        assert running.left() == []


@pytest.fixture(scope="session")
def client(daemon):
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0, timeout=120)
