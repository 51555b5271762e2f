#!/usr/bin/env bash
# Lint, types and tests; sets up the environment if need be.
#   bash scripts/check.sh              the default tier
#   bash scripts/check.sh --all        also the slow tier
#   bash scripts/check.sh -k episode   further arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

tier="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then tier="not gpu"; shift; fi

declare -a report
part() { # part NAME COMMAND...: runs a part and remembers its time
  local name=$1 started=$SECONDS; shift
  echo "== $name"
  "$@"
  report+=("$(printf '%-8s %4d s' "$name" $((SECONDS - started)))")
}
part lint ruff check .
part format ruff format --check .
part types mypy
part unit python -m pytest -m "($tier) and not engine and not e2e" --durations=5 "$@"
part engine python -m pytest -m "($tier) and engine" --durations=0 "$@"
part e2e python -m pytest -m "($tier) and e2e" --durations=0 "$@"
echo "== all parts passed"
printf '%s\n' "${report[@]}"
