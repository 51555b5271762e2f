#!/usr/bin/env bash
# Fault drills: kills processes of real runs, fills a disk, and prints what happened, how long it took, what was lost.
# Options: python -m tests.drills --help
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
python -m tests.drills "$@"
