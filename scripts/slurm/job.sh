# shellcheck shell=bash
# One job on 1..N whole nodes: retrieval servers and Ray beside one stage, and what follows its end. Sourced by the
# sbatch files here; the settings (DGPO_..) are the exports of what `python -m dgpo.slurm` renders. See docs/slurm.md.
set -euo pipefail

STOPPED_ON_REQUEST=75 # dgpo/runs/stopping.py
WRONG_CONFIGURATION=2
TERMINATED=143
RESERVE_S=60 # of the time between SLURM's warning and the limit: to end everything and requeue
KILL_WAIT_S=20 # between SLURM's SIGTERM and its SIGKILL there are 30 s
START_TIMEOUT_S=${DGPO_START_TIMEOUT_S:-1800} # an index of 65 GB is read from disk first

run_dir=$DGPO_RUN_DIR
settings=()
if [ -n "${DGPO_SEEDS:-}" ]; then
  read -ra seeds <<<"$DGPO_SEEDS"
  run_dir=$run_dir/seed${seeds[$SLURM_ARRAY_TASK_ID]}
  settings+=("seed=${seeds[$SLURM_ARRAY_TASK_ID]}")
fi
settings+=("run_dir=$run_dir")
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || settings+=(resume=true)

logs=$run_dir/logs
private=$run_dir/slurm/job-$SLURM_JOB_ID # tokens and ports, seen by every node
node_tmp=$DGPO_NODE_TMP/dgpo-$SLURM_JOB_ID # on each node; short, because Ray's sockets lie below it
failures=$run_dir/slurm/$DGPO_STAGE.failures
rm -rf "$private"
mkdir -p "$logs" "$private"
chmod 700 "$private"
read -ra container <<<"${DGPO_CONTAINER:-}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# SLURM may name the GPUs to every maker's library at once; veRL then takes NVIDIA's for AMD's. srun sets them anew.
other_makers=(-u ROCR_VISIBLE_DEVICES -u HIP_VISIBLE_DEVICES)
steps=()
stage_pid='' timer_pid='' warned='' terminated='' failed=''
export RAY_TMPDIR=$node_tmp

say() { echo "[$(date '+%F %T')] $DGPO_STAGE, job $SLURM_JOB_ID: $*"; }

address() { # address NODE: its IP, as the other nodes reach it
  local name found
  name=$(scontrol --oneliner show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  found=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ {print $1; exit}' || true)
  [ -n "$found" ] || found=$(on_node "$1" hostname -I | awk '{print $1}')
  echo "$found"
}

on_node() { # on_node NODE COMMAND...: in a subshell, which becomes srun; with all of the node, beside what runs there
  local node=$1
  shift
  exec srun --overlap --nodelist="$node" --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --mem=0 "$@"
}

step() { # step NODE NAME COMMAND...: runs on a node until the job ends; NAME is that of its log
  local node=$1 name=$2
  shift 2
  on_node "$node" --output="$logs/$DGPO_STAGE-$name.log" --open-mode=append \
    env "${other_makers[@]}" "${container[@]}" "$@" &
  steps+=($!)
}

await() { # await WHAT COMMAND...: waits for the command, but not longer than all steps of the job live
  local what=$1 waiter
  shift
  timeout "$START_TIMEOUT_S" "${container[@]}" "$@" &
  waiter=$!
  wait -n "$waiter" "${steps[@]}" || true
  if kill -0 "$waiter" 2>/dev/null; then
    kill "$waiter"
    retry "$what: a step of the job ended, see $logs/$DGPO_STAGE-*.log"
  fi
  wait "$waiter" || retry "$what: not ready, see $logs/$DGPO_STAGE-*.log"
}

make_token() { (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$1"); }

start_retrievers() { # on the first DGPO_RETRIEVER_NODES nodes, in an environment of their own; none where a URL was given
  [ -n "${DGPO_RETRIEVER:-}" ] || return 0
  local node token=$private/retriever_token urls=()
  make_token "$token"
  for node in "${nodes[@]:0:${DGPO_RETRIEVER_NODES:-1}}"; do
    step "$node" "retriever-$node" bash -c "${DGPO_RETRIEVER_ACTIVATE:-:}
      exec python -m retriever.serve --host $(address "$node") --port 0 --port-file '$private/port-$node' \
        --token-file '$token' $DGPO_RETRIEVER"
  done
  await "retrieval server" python -m dgpo.slurm.ready ports "$private" "${nodes[@]:0:${DGPO_RETRIEVER_NODES:-1}}"
  for node in "${nodes[@]:0:${DGPO_RETRIEVER_NODES:-1}}"; do
    urls+=("http://$(address "$node"):$(cat "$private/port-$node")")
  done
  await "retrieval server" python -m dgpo.slurm.ready retrievers "${urls[@]}"
  settings+=("retriever.url='$(IFS=,; echo "${urls[*]}")'" "retriever.token_file=$token")
  say "retrieval server ready: ${urls[*]}"
}

start_ray() { # a cluster over all nodes, for this job alone; on one node the stage starts Ray itself
  [ "${#nodes[@]}" -gt 1 ] || return 0
  local node head start
  head=$(address "${nodes[0]}")
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/ray_token RAY_USAGE_STATS_ENABLED=0
  export RAY_ADDRESS=$head:$((20000 + SLURM_JOB_ID % 10000))
  make_token "$RAY_AUTH_TOKEN_PATH"
  start=(ray start --block --disable-usage-stats --num-cpus="${DGPO_CPUS:-$SLURM_CPUS_ON_NODE}" --num-gpus="$DGPO_GPUS")
  [ -z "${DGPO_OBJECT_STORE_BYTES:-}" ] || start+=(--object-store-memory="$DGPO_OBJECT_STORE_BYTES")
  step "${nodes[0]}" "ray-${nodes[0]}" env -u RAY_ADDRESS "${start[@]}" --head --node-ip-address="$head" \
    --port="${RAY_ADDRESS##*:}" --include-dashboard=false
  await "Ray's head" python -m dgpo.slurm.ready ray 1
  for node in "${nodes[@]:1}"; do
    step "$node" "ray-$node" env -u RAY_ADDRESS "${start[@]}" --address="$RAY_ADDRESS" \
      --node-ip-address="$(address "$node")"
  done
  await "Ray on ${#nodes[@]} nodes" python -m dgpo.slurm.ready ray "${#nodes[@]}"
  say "Ray on ${nodes[*]} at $RAY_ADDRESS"
}

run_stage() { # run_stage [key=value ...]: the stage on these nodes; ends the job where it cannot end well
  local code=0 argument arguments=()
  for argument in "$@"; do arguments+=("${argument//\{run_dir\}/$run_dir}"); done
  say "start ${SLURM_RESTART_COUNT:-0} on ${nodes[*]}"
  env "${other_makers[@]}" "${container[@]}" python -m dgpo "$DGPO_STAGE" "${arguments[@]}" "${settings[@]}" &
  stage_pid=$!
  while true; do # a signal ends `wait` before the stage ends
    wait "$stage_pid" && code=0 || code=$?
    if [ "$code" -le 128 ] || ! kill -0 "$stage_pid" 2>/dev/null; then break; fi
  done
  stage_pid=''
  if [ "$code" -eq 0 ]; then return; fi
  say "the stage ended with status $code"
  if [ -n "$terminated" ]; then exit $TERMINATED; fi # cancelled or preempted: SLURM knows what follows
  if [ "$code" -eq $STOPPED_ON_REQUEST ] || [ -n "$warned" ]; then again "the time limit is near"; fi
  failed=1
  if [ "$code" -eq $WRONG_CONFIGURATION ]; then exit "$code"; fi
  retry "the stage ended with status $code"
}

retry() { # retry REASON: a lost node, server or process costs one of DGPO_RETRIES attempts
  failed=1
  echo "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0}: $1" >>"$failures"
  [ "$(wc -l <"$failures")" -le "${DGPO_RETRIES:-2}" ] || { say "no attempt left, see $failures"; exit 1; }
  again "$1"
}

again() { # again REASON: back into the queue; the next start resumes
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${DGPO_MAX_RESTARTS:-50}" ]; then
    say "$1, but it was started ${DGPO_MAX_RESTARTS:-50} times again already"
    exit 1
  fi
  say "$1: requeued"
  tear_down
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # SLURM ends this script meanwhile
  exit 1
}

warn() { # SIGUSR1, DGPO_LEAD_S before the time limit: the stage saves what it has, or is killed in time to be requeued
  warned=1
  say "SIGUSR1: the time limit is $DGPO_LEAD_S s away"
  [ -n "$stage_pid" ] || again "the time limit came before the stage began"
  kill -USR1 "$stage_pid" 2>/dev/null || true
  kill_after $((DGPO_LEAD_S - RESERVE_S))
}

terminate() { # SIGTERM: cancelled, preempted, or requeued from outside
  terminated=1
  say "SIGTERM"
  [ -n "$stage_pid" ] || exit $TERMINATED
  kill -TERM "$stage_pid" 2>/dev/null || true
  kill_after $KILL_WAIT_S
}

kill_after() {
  [ -z "$timer_pid" ] || kill "$timer_pid" 2>/dev/null || true
  (sleep "$1" && kill -KILL "$stage_pid") >/dev/null 2>&1 &
  timer_pid=$!
}

tear_down() { # what still runs on the nodes, their files, and the tokens; Ray's logs stay after a failure
  trap : USR1 TERM
  trap - EXIT
  local keep=:
  [ -z "$stage_pid" ] || kill -KILL "$stage_pid" 2>/dev/null || true
  [ -z "$timer_pid" ] || kill "$timer_pid" 2>/dev/null || true
  # shellcheck disable=SC2016 # the node's own variable
  [ -z "$failed" ] || keep='tar -czf "'"$logs/$DGPO_STAGE-ray-"'$SLURMD_NODENAME.tgz" -C "'"$node_tmp"'/ray" --exclude=sockets .'
  timeout 30 srun --overlap --ntasks="${#nodes[@]}" --mem=0 bash -c "$keep" 2>/dev/null || true
  if [ "${#steps[@]}" -gt 0 ]; then
    kill "${steps[@]}" 2>/dev/null || true
    wait_for_steps 5 || { # Ray drains for 30 s, though nothing is left to drain
      squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -E '^[0-9]+\.[0-9]+$' |
        xargs --no-run-if-empty scancel --signal=KILL || true
      wait_for_steps 15 || true # SLURM kills what is left when the script ends
    }
  fi
  timeout 60 srun --overlap --ntasks="${#nodes[@]}" --mem=0 rm -rf "$node_tmp" 2>/dev/null || true
  rm -rf "$private"
}

wait_for_steps() { # wait_for_steps SECONDS
  local end=$((SECONDS + $1))
  while kill -0 "${steps[@]}" 2>/dev/null; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.2
  done
}

trap tear_down EXIT
trap warn USR1
trap terminate TERM
set +u # the scripts of environments read what may not be set
eval "${DGPO_ACTIVATE:-}"
set -u
