#!/usr/bin/env bash
# Installs a locked set of packages, and this project, into the active Python environment. Does nothing when done.
#   bash scripts/install.sh cpu|gpu                    everything
#   bash scripts/install.sh retriever|retriever-gpu    what the retrieval server and index builder need
# For gpu, DGPO_FLASH_ATTN says how flash-attn gets there, which has no wheel for this torch on the package index:
#   build    compiled here, from the locked source (the default): nvcc of CUDA 13 and g++, 9 GB of memory per job
#   wheel    DGPO_FLASH_ATTN_WHEEL, a file or URL with the SHA-256 DGPO_FLASH_ATTN_SHA256; the choice where it is set
#   none     left out: slower, and run with hardware.attention=sdpa hardware.remove_padding=false
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

KINDS=(cpu gpu retriever retriever-gpu)
LEAST_DRIVER=580 # of torch's CUDA 13 build
GB_PER_JOB=9     # of flash-attn's build

say() { echo "$*" >&2; }
refuse() { say "scripts/install.sh: $*"; exit 2; }

kind="${1:-cpu}"
case "$kind" in
  cpu) torch="torch==2.13.0+cpu" torch_index=https://download.pytorch.org/whl/cpu size="5 GB, about 3 minutes" ;;
  retriever) torch="torch==2.13.0+cpu" torch_index=https://download.pytorch.org/whl/cpu size="2 GB, about 2 minutes" ;;
  gpu) torch="torch==2.11.0" torch_index=https://download.pytorch.org/whl/cu130 size="about 12 GB" ;;
  retriever-gpu) torch="torch==2.11.0" torch_index=https://download.pytorch.org/whl/cu130 size="about 9 GB" ;;
  *) refuse "unknown set $kind: expected one of ${KINDS[*]}" ;;
esac
lock="requirements/$kind.lock"
prefix="$(python -c 'import sys; print(sys.prefix)')"
flash="${DGPO_FLASH_ATTN:-$([ -n "${DGPO_FLASH_ATTN_WHEEL:-}" ] && echo wheel || echo build)}"
wheel="${DGPO_FLASH_ATTN_WHEEL:-}"
[ "$kind" = gpu ] || flash=none

for other in "${KINDS[@]}"; do # two sets own the same folders of site-packages
  if [ "$other" != "$kind" ] && compgen -G "$prefix/dgpo-installed-$other-[0-9a-f]*" >/dev/null; then
    refuse "$prefix holds the $other set, and the $kind set would break it: use another environment" \
      "(python -m venv .venv-$kind; for quickstart.sh and check.sh: DGPO_VENV=.venv-$kind; pixi: -e)"
  fi
done
content="$(cat "$lock" pyproject.toml scripts/install.sh <(echo "$flash $wheel") | sha256sum | cut -c1-16)"
stamp="$prefix/dgpo-installed-$kind-$content"
[ ! -e "$stamp" ] || exit 0

check_driver() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || version=''
  version="${version%%$'\n'*}" # a line per GPU; a pipe that is read to its first line alone may fail
  if [ -z "$version" ]; then
    say "note: no NVIDIA driver here; where it runs, the driver must be $LEAST_DRIVER or newer (CUDA 13)"
  elif [ "${version%%.*}" -lt "$LEAST_DRIVER" ]; then
    say "warning: this machine's NVIDIA driver is $version; torch's CUDA 13 build needs $LEAST_DRIVER or newer"
  fi
}

nvcc_release() { "$1" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p'; }

check_flash_attn() { # what the way that was chosen needs, before anything is installed
  local ways="or take a prebuilt wheel (DGPO_FLASH_ATTN_WHEEL=file or URL, DGPO_FLASH_ATTN_SHA256=..), or none \
(DGPO_FLASH_ATTN=none; then run with hardware.attention=sdpa hardware.remove_padding=false)"
  case "$flash" in
    none) ;;
    wheel)
      [ -n "$wheel" ] || refuse "DGPO_FLASH_ATTN=wheel, but DGPO_FLASH_ATTN_WHEEL is not set: a file or URL of the wheel"
      [[ "${DGPO_FLASH_ATTN_SHA256:-}" =~ ^[0-9a-f]{64}$ ]] ||
        refuse "DGPO_FLASH_ATTN_SHA256=${DGPO_FLASH_ATTN_SHA256:-}: expected the 64 hex digits of the wheel's SHA-256"
      [[ "$wheel" == *://* ]] || [ -f "$wheel" ] || refuse "DGPO_FLASH_ATTN_WHEEL=$wheel: no such file, and no URL"
      [[ "$wheel" == *://* ]] || wheel="file://$(realpath "$wheel")"
      ;;
    build)
      # nvcc on the PATH may be a link or a wrapper, so it is asked where it is.
      [ -n "${CUDA_HOME:-}" ] || CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p') ||
        CUDA_HOME=/usr/local/cuda
      [ "$(nvcc_release "${CUDA_HOME:-}/bin/nvcc")" = 13 ] ||
        refuse "building flash-attn needs nvcc of CUDA 13 (seen: ${CUDA_HOME:-no CUDA_HOME, no nvcc}): set CUDA_HOME, $ways"
      command -v g++ >/dev/null || refuse "building flash-attn needs g++: install it, $ways"
      export CUDA_HOME
      ;;
    *) refuse "DGPO_FLASH_ATTN=$flash: expected build, wheel or none" ;;
  esac
}

of_lock() { awk -v wanted="$1" '/^[^ ]/ {keep = (/^flash-attn==/ ? "flash" : "rest") == wanted} keep' "$lock"; }

build_flash_attn() { # with its progress: pip shows ninja's "[12/73] nvcc .."
  local jobs memory
  jobs=$(($(nproc) / 2))
  memory=$(awk -v gb=$GB_PER_JOB '/^MemAvailable/ {print int($2 / 1e6 / gb)}' /proc/meminfo)
  [ "$memory" -ge "$jobs" ] || jobs=$memory
  [ "$jobs" -ge 1 ] || jobs=1
  export MAX_JOBS="${MAX_JOBS:-$jobs}"
  # sm_80 code runs on 86 and 89 too: with 90, every card of dgpo/hardware/known_gpus.py.
  export FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS:-80;90}" FLASH_ATTENTION_FORCE_BUILD=TRUE
  say "Compiling flash-attn in $MAX_JOBS jobs: half an hour with 16, hours with one or two"
  python -m pip --disable-pip-version-check install --verbose --no-deps --no-build-isolation --require-hashes \
    -r <(of_lock flash) 2>&1 | tee -a "$log" | sed -un 's/^ *\(\[[0-9]*\/[0-9]*\]\).*/flash-attn \1/p' >&2
}

install_all() {
  local pip=(python -m pip --disable-pip-version-check install --quiet)
  # torch first, so that nothing pulls another build: from the configured sources, else from PyTorch's own index.
  "${pip[@]}" "$torch" || "${pip[@]}" "$torch" --extra-index-url "$torch_index"
  # The lock is complete: nothing is resolved here, and every file is checked against its hash.
  "${pip[@]}" --no-deps --require-hashes -r <(of_lock rest)
  [ "$flash" != wheel ] ||
    "${pip[@]}" --no-deps --require-hashes -r <(echo "flash-attn @ $wheel --hash=sha256:$DGPO_FLASH_ATTN_SHA256")
  "${pip[@]}" --no-deps --no-build-isolation -e .
}

log="$prefix/dgpo-install.log"
failed() { tail -n 20 "$log" >&2; say "scripts/install.sh: failed, see $log"; exit 1; }
[[ "$kind" != *gpu ]] || check_driver
check_flash_attn
say "Installing $lock ($size; log: $log)"
set +e # `install_all || failed` would go on after an error in its middle
(set -e; install_all) >"$log" 2>&1
status=$?
set -e
[ "$status" -eq 0 ] || failed
if [ "$flash" = build ]; then build_flash_attn || failed; fi
if [ "$flash" != none ] && ! python -c 'import torch, flash_attn_2_cuda' >>"$log" 2>&1; then
  say "warning: flash-attn was installed but does not load ($(tail -n 1 "$log"))"
fi
rm -f "$prefix"/dgpo-installed-*
touch "$stamp"
