"""Ray Serve LLM with the vLLM that its Ray pins: the base alone, until it is told to stop. Runs in an environment of its own.

python benchmarks/_ray_serve_llm.py PORT MODEL NAME ENGINE_KWARGS_AS_JSON
"""

import json
import signal
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main(port: int, model: str, name: str, engine: dict[str, object]) -> None:
    """Answer until told to stop."""
    ray.init(address="local", num_cpus=16, include_dashboard=False)  # places, not cores: its ingress wants some of its own
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        engine_kwargs=engine,
        placement_group_config={"bundles": [{"CPU": 1}]},  # by which it knows that there is no GPU, too
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 256},
        log_engine_metrics=False,
    )
    try:
        serve.run(build_openai_app({"llm_configs": [config]}))
        signal.pause()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    _, port, model, name, engine = sys.argv
    main(int(port), model, name, json.loads(engine))
