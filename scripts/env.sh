# shellcheck shell=bash
# Sourced by the other scripts: makes or reuses .venv (DGPO_VENV: another folder) and activates it, with the CPU set.
# A fresh machine needs Python 3.11 or 3.12 with pip, nothing else. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="$(realpath -m "${DGPO_VENV:-.venv}")"
if [ ! -x "$venv/bin/python" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
    echo "Python 3.11 or 3.12 is needed, $("$python" --version) found: set PYTHON=/path/to/python3.11" >&2
    exit 2
  }
  "$python" -m venv "$venv"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
bash scripts/install.sh cpu
