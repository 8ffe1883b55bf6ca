# What the batch files share, which set BIGMIX_ROOT and source this: the environment of the ranks, running bigmix in a
# job, and requeueing.

MAX_RESTARTS=${MAX_RESTARTS:-50}
RESTARTS=${SLURM_RESTART_COUNT:-0}
# In an array the SLURM_JOB_ID of one task is the number of the array, which would be requeued as a whole.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}
# Since Slurm 22.05 srun does not inherit this from sbatch.
CPUS=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
# It may have several words: PYTHON="apptainer exec --nv image.sif python".
read -ra PYTHON_WORDS <<<"${PYTHON:-python}"

say() { echo "slurm: $*"; }

refuse() {
  echo "error: $*" >&2
  exit 2
}

# set_environment: the variables that the ranks inherit.
set_environment() {
  export PYTHONPATH=$BIGMIX_ROOT${PYTHONPATH:+:$PYTHONPATH}
  # On a disk of each node: caches on a network file system are slow, and their locks outlive a job that is killed.
  LOCAL=${BIGMIX_LOCAL:-${SLURM_TMPDIR:-/tmp}}/bigmix-$SLURM_JOB_ID
  # New for each attempt: a lock that an attempt leaves behind when killed would block all later ones silently.
  export TORCH_EXTENSIONS_DIR=$LOCAL/torch-extensions-$RESTARTS
  export TRITON_CACHE_DIR=$LOCAL/triton
  # If it were unset, each rank would start as many threads as its node has cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Without it a broken link is reported only as "unhandled system error".
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

# set_meeting_point: where the ranks meet. The address is the one by which Slurm itself reaches the first node, since
# the name of a node need not resolve; the port differs between jobs on one node and between attempts of one job.
set_meeting_point() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
  MASTER_PORT=$((10000 + (53 * SLURM_JOB_ID + RESTARTS) % 19997))
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
}

# set_container: the options of srun for CONTAINER, an image that pyxis (https://github.com/NVIDIA/pyxis) starts.
set_container() {
  CONTAINER_OPTIONS=()
  if [ -n "${CONTAINER:-}" ]; then
    # Paths are the same inside and outside, so that those in a recipe are found in both.
    local mounts=$PWD:$PWD,$BIGMIX_ROOT:$BIGMIX_ROOT,$LOCAL:$LOCAL
    CONTAINER_OPTIONS=(
      --container-image="$CONTAINER" --container-workdir="$PWD"
      --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
  fi
}

# on_each_node COMMAND...: run a command once on every node of the job, outside the container.
on_each_node() {
  # A node that does not answer must not keep the job from ending.
  timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 "$@"
}

# begin: what every job does first. "${BIGMIX[@]}" COMMAND then runs a command of bigmix as one task.
begin() {
  set_environment
  set_container
  BIGMIX=(
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${CPUS[@]}" "${CONTAINER_OPTIONS[@]}"
    "${PYTHON_WORDS[@]}" -u -m bigmix.commands
  )
  on_each_node mkdir -p "$LOCAL"
}

# clean_up: delete what the job has left on its nodes.
clean_up() {
  [ "$(squeue --noheader --jobs="$JOB" --format=%T)" = RUNNING ] || return
  on_each_node rm -rf "$LOCAL"
}

# is_being_ended: whether Slurm is ending this job because it was cancelled, or requeued by someone else.
is_being_ended() {
  local state
  state=$(squeue --noheader --jobs="$JOB" --format="%T %r")
  # A job that has reached its time limit can still be requeued.
  [[ $state == COMPLETING* && $state != *TimeLimit ]]
}

# run_step COMMAND...: run srun in the background, so that traps can pass stop requests on to it; sets `code` to its
# exit code.
run_step() {
  "$@" &
  step=$!
  # A trap ends `wait` early. The exit code of a child that has ended in the meantime is kept for the last `wait`.
  wait "$step"
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  code=$?
  step=
}

# requeue CODE REASON: put the job back into the queue and end it; if that must not or cannot be done, end it with CODE.
requeue() {
  local code=$1 reason=$2
  if is_being_ended; then
    stop "$code" "$reason; the job was cancelled, or requeued by someone else"
  elif [ "$RESTARTS" -ge "$MAX_RESTARTS" ]; then
    stop "$code" "$reason; it was restarted $RESTARTS times and MAX_RESTARTS is $MAX_RESTARTS"
  fi
  clean_up
  say "requeued: $reason (restart $((RESTARTS + 1)) of at most $MAX_RESTARTS)"
  scontrol requeue "$JOB" && exit 0
  stop "$code" "$reason; scontrol refused, so submit it again (was it submitted with --no-requeue?)"
}

# finish_done: end a job that is done.
finish_done() {
  clean_up
  say "done"
  exit 0
}

# stop CODE REASON: end the job without requeueing it.
stop() {
  clean_up
  say "not requeued: $2"
  exit "$1"
}

# submit OPTIONS...: sbatch from inside a job, without the variables that Slurm has set for this job alone.
submit() {
  local name
  local -a without=()
  for name in $(compgen -e SLURM_); do
    [ "$name" = SLURM_CONF ] || without+=(-u "$name")
  done
  env "${without[@]}" sbatch --parsable --partition="$SLURM_JOB_PARTITION" \
    ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} "$@"
}

# after_array NAME COMMAND...: submit a job that runs a command of bigmix once all tasks of this array have ended. All
# tasks call this, and the first one submits. If a task has failed, the command itself finds and reports what is missing.
after_array() {
  local name=$1-$SLURM_ARRAY_JOB_ID job
  shift
  [ "$SLURM_ARRAY_TASK_ID" -eq "$SLURM_ARRAY_TASK_MIN" ] || return 0
  # It exists if an earlier attempt has submitted it.
  [ -z "$(squeue --noheader --name="$name" --format=%i)" ] || return 0
  if job=$(submit --job-name="$name" --dependency="afterany:$SLURM_ARRAY_JOB_ID" \
    "$BIGMIX_ROOT/slurm/command.sbatch" "$@"); then
    say "job ${job%%;*} follows when all of the array have ended: bigmix $*"
  else
    say "could not submit the job that follows; when all of the array have ended, run: bigmix $*"
  fi
}

# check_array: set `place` to the place of this task in the array, from 1, and `places` to the number of tasks.
check_array() {
  local last=$(((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1))
  places=$SLURM_ARRAY_TASK_COUNT
  place=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1))
  [ "$last" -eq "$places" ] || refuse "the array has gaps: $places tasks from" \
    "$SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX; give all, such as --array=0-15 (tasks that are done end at once)"
}
