# Sourced by the other scripts: makes or reuses .venv from requirements/cpu.lock, and activates it.
# A fresh machine needs Python 3.11 or 3.12 and pip, nothing else. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_version=2.13.0
stamp=".venv/installed-$(cat requirements/cpu.lock pyproject.toml | sha256sum | cut -c1-16)"

if [ ! -e "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
    echo "Python 3.11 or 3.12 is needed, $("$python" --version) found: set PYTHON=/path/to/python3.11" >&2
    exit 2
  }
  echo "Installing the environment into .venv (about 3 minutes, 5 GB; log: .venv/install.log)" >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)
  {
    # The CPU build of torch, from the configured sources if they have it, else from PyTorch's own index.
    "${pip[@]}" "torch==$torch_version+cpu" ||
      "${pip[@]}" "torch==$torch_version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    # The lock is complete: nothing is resolved here, every file is checked against its hash.
    "${pip[@]}" --no-deps --require-hashes -r requirements/cpu.lock
    "${pip[@]}" --no-deps --no-build-isolation -e .
  } >.venv/install.log 2>&1 || { tail -n 20 .venv/install.log >&2; exit 1; }
  rm -f .venv/installed-*
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
