#!/usr/bin/env bash
# Sets up the environment and runs the whole method on the tiny world: collect, distil, train, evaluate, report.
#   bash scripts/quickstart.sh [key=value ...]     e.g. seed=2
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m dgpo quickstart "$@"
