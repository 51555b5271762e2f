#!/usr/bin/env bash
# Installs a locked set of packages, and this project, into the active Python environment. Does nothing when done.
#   bash scripts/install.sh cpu|gpu                    everything
#   bash scripts/install.sh retriever|retriever-gpu    what the retrieval server and index builder need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind="${1:-cpu}"
case "$kind" in
  cpu | retriever) torch="torch==2.13.0+cpu" torch_index=https://download.pytorch.org/whl/cpu ;;
  gpu | retriever-gpu) torch="torch==2.11.0" torch_index=https://download.pytorch.org/whl/cu130 ;;
  *) echo "usage: bash scripts/install.sh cpu|gpu|retriever|retriever-gpu, not $kind" >&2; exit 2 ;;
esac
lock="requirements/$kind.lock"
prefix="$(python -c 'import sys; print(sys.prefix)')"
stamp="$prefix/dgpo-installed-$(cat "$lock" pyproject.toml scripts/install.sh | sha256sum | cut -c1-16)"
[ ! -e "$stamp" ] || exit 0

log="$prefix/dgpo-install.log"
echo "Installing $lock (about 3 minutes; 5 GB for cpu, 2 GB for retriever; log: $log)" >&2
pip=(python -m pip --disable-pip-version-check install --quiet)
{
  # torch first, so that nothing pulls another build: from the configured sources, else from PyTorch's own index.
  "${pip[@]}" "$torch" || "${pip[@]}" "$torch" --extra-index-url "$torch_index"
  if [ "$kind" = gpu ]; then # flash-attn ships source only; it builds against the torch above
    "${pip[@]}" --no-deps --require-hashes -r <(awk '/^[^ ]/ {keep = !/^flash-attn==/} keep' "$lock")
    "${pip[@]}" --no-deps --no-build-isolation --require-hashes -r <(awk '/^[^ ]/ {keep = /^flash-attn==/} keep' "$lock")
  else
    # The lock is complete: nothing is resolved here, and every file is checked against its hash.
    "${pip[@]}" --no-deps --require-hashes -r "$lock"
  fi
  "${pip[@]}" --no-deps --no-build-isolation -e .
} >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
rm -f "$prefix"/dgpo-installed-*
touch "$stamp"
