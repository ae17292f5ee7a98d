"""Ray Serve LLM as its documentation starts it, with vLLM's settings as the others have them.

python benchmarks/_ray_llm.py PORT BASE DTYPE
"""

from __future__ import annotations

import os
import signal
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Answer until told to stop."""
    _, port, base, dtype = sys.argv
    engine = {"dtype": dtype, "max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory_bytes": 2**29, "enforce_eager": True}
    config = LLMConfig(
        model_loading_config={"model_id": "base", "model_source": base},
        engine_kwargs=engine,
        accelerator_config={"kind": "cpu"},
        deployment_config={"num_replicas": 1},
        runtime_env={
            "env_vars": {
                name: value for name, value in os.environ.items() if name.startswith(("OMP_", "VLLM_", "LEARND_", "GLIBC_"))
            }
        },
    )
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build_openai_app({"llm_configs": [config]}))
    signal.sigwait([signal.SIGINT, signal.SIGTERM])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
