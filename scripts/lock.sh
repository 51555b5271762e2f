#!/usr/bin/env bash
# Resolves requirements/*.lock from pyproject.toml with uv (`pip install uv`). Nothing is installed.
#   bash scripts/lock.sh                                     all
#   bash scripts/lock.sh cpu|gpu|retriever|retriever-gpu     one
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile --python-version 3.11 --no-annotate --no-header --generate-hashes --quiet "$@"; }
# The retriever's environment has its own packages only, without those that pyproject.toml lists for dgpo.
retriever_packages() {
  python3 - "$@" <<'PYTHON'
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(package for extra in sys.argv[1:] for package in extras[extra]), sep="\n")
PYTHON
}

# torch is left out of the CPU locks: its CPU build has no index that all machines share, so scripts/install.sh
# installs it by version.
lock_cpu() {
  compile pyproject.toml --extra cpu --extra retriever --extra dev --override requirements/overrides-cpu.txt \
    --no-emit-package torch -o requirements/cpu.lock
}
lock_gpu() {
  compile pyproject.toml --extra gpu --extra retriever --extra retriever-gpu \
    --override requirements/overrides-gpu.txt --no-build-isolation-package flash-attn -o requirements/gpu.lock
}
lock_retriever() {
  retriever_packages retriever | compile - --override requirements/overrides-cpu.txt --no-emit-package torch \
    -o requirements/retriever.lock
}
lock_retriever_gpu() {
  retriever_packages retriever retriever-gpu | compile - --override requirements/overrides-gpu.txt \
    -o requirements/retriever-gpu.lock
}
kinds=(cpu gpu retriever retriever-gpu)
case " ${kinds[*]} all " in
  *" ${1:-all} "*) ;;
  *) echo "usage: bash scripts/lock.sh [${kinds[*]}]" >&2; exit 2 ;;
esac
for kind in "${kinds[@]}"; do
  if [ "${1:-all}" = all ] || [ "$1" = "$kind" ]; then "lock_${kind//-/_}"; fi
done
