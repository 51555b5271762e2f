#!/usr/bin/env bash
# Resolves requirements/{cpu,gpu}.lock from pyproject.toml with uv (`pip install uv`). Nothing is installed.
#   bash scripts/lock.sh            both
#   bash scripts/lock.sh cpu|gpu    one
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile pyproject.toml --python-version 3.11 --no-annotate --no-header --generate-hashes "$@"; }

lock_cpu() {
  # torch is left out: its CPU build has no index that all machines share, so scripts/env.sh installs it by version.
  compile --extra cpu --extra retriever --extra dev --override requirements/overrides-cpu.txt \
    --no-emit-package torch -o requirements/cpu.lock --quiet
}
lock_gpu() {
  compile --extra gpu --extra retriever --extra retriever-gpu --override requirements/overrides-gpu.txt \
    --no-build-isolation-package flash-attn -o requirements/gpu.lock --quiet
}
case "${1:-all}" in
  cpu) lock_cpu ;;
  gpu) lock_gpu ;;
  all) lock_cpu; lock_gpu ;;
  *) echo "usage: bash scripts/lock.sh [cpu|gpu]" >&2; exit 2 ;;
esac
