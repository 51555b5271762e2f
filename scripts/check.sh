#!/usr/bin/env bash
# Lint, types and tests; sets up the environment if need be.
#   bash scripts/check.sh              the default tier
#   bash scripts/check.sh --all        also the slow tier
#   bash scripts/check.sh -k episode   further arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

tier="not slow and not gpu and not pending"
if [ "${1:-}" = "--all" ]; then tier="not gpu"; shift; fi

declare -a report
part() { # part NAME COMMAND...: runs a part and remembers its time
  local name=$1 started=$SECONDS; shift
  echo "== $name"
  "$@"
  report+=("$(printf '%-8s %4d s' "$name" $((SECONDS - started)))")
}
arguments=("$@")
tests() { # tests MARKERS: pytest's "no test selected" (5) is fine where the caller's own arguments narrowed the choice
  local status=0
  python -m pytest -m "($tier) and $1" --durations=5 "${arguments[@]}" || status=$?
  [ "$status" -eq 0 ] || { [ "$status" -eq 5 ] && [ "${#arguments[@]}" -gt 0 ]; }
}
part lint ruff check .
part format ruff format --check .
part types mypy
part unit tests "not engine and not e2e"
part engine tests "engine"
part e2e tests "e2e"
echo "== all parts passed"
[ "${tier%pending}" = "$tier" ] || echo "left out, not seen to pass lately: $(grep -cv "^#" tests/pending.txt) lines of tests/pending.txt"
printf '%s\n' "${report[@]}"
