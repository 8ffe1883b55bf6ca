# Sourced by the batch files, which have set BIGMIX_ROOT: what the ranks find, bigmix in a job, and how a job goes on.

MAX_RESTARTS=${MAX_RESTARTS:-50}
RESTARTS=${SLURM_RESTART_COUNT:-0}
# SLURM_JOB_ID of one task of an array is the number of the whole array: it would requeue all of it.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}
# srun does not take this over from sbatch since Slurm 22.05.
CPUS=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
# Several words are allowed: PYTHON="apptainer exec --nv image.sif python".
read -ra PYTHON_WORDS <<<"${PYTHON:-python}"

say() { echo "slurm: $*"; }

refuse() {
  echo "error: $*" >&2
  exit 2
}

# What the ranks inherit.
set_environment() {
  export PYTHONPATH=$BIGMIX_ROOT${PYTHONPATH:+:$PYTHONPATH}
  # A folder on a disk of each node: caches on a network file system are slow, and their locks outlive a killed job.
  LOCAL=${BIGMIX_LOCAL:-${SLURM_TMPDIR:-/tmp}}/bigmix-$SLURM_JOB_ID
  # New for each attempt: a lock that a killed attempt left behind would stop all later ones without a word.
  export TORCH_EXTENSIONS_DIR=$LOCAL/torch-extensions-$RESTARTS
  export TRITON_CACHE_DIR=$LOCAL/triton
  # Where it is unset, each rank would start as many threads as its node has cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Without it a link that breaks is reported as "unhandled system error" alone.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

# The point where the ranks meet: the address by which Slurm itself reaches the first node, since the name of a node need
# not resolve, and a port that differs between jobs that share the node and between attempts of one job.
set_meeting_point() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
  MASTER_PORT=$((10000 + (53 * SLURM_JOB_ID + RESTARTS) % 19997))
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
}

# Options of srun for CONTAINER, an image that pyxis (https://github.com/NVIDIA/pyxis) starts; none without it.
set_container() {
  CONTAINER_OPTIONS=()
  if [ -n "${CONTAINER:-}" ]; then
    # The same paths inside as outside, so that what a recipe names is found by both.
    local mounts=$PWD:$PWD,$BIGMIX_ROOT:$BIGMIX_ROOT,$LOCAL:$LOCAL
    CONTAINER_OPTIONS=(
      --container-image="$CONTAINER" --container-workdir="$PWD"
      --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
  fi
}

# on_each_node COMMAND...: once on every node of the job, outside the container.
on_each_node() {
  # A node that does not answer must not keep the job from ending.
  timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 "$@"
}

# begin: what every job does first. BIGMIX are the words before a command of bigmix that runs as one task.
begin() {
  set_environment
  set_container
  BIGMIX=(
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${CPUS[@]}" "${CONTAINER_OPTIONS[@]}"
    "${PYTHON_WORDS[@]}" -u -m bigmix.commands
  )
  on_each_node mkdir -p "$LOCAL"
}

# The job leaves nothing on its nodes.
clean_up() {
  [ "$(squeue --noheader --jobs="$JOB" --format=%T)" = RUNNING ] || return
  on_each_node rm -rf "$LOCAL"
}

# is_being_ended: whether Slurm ends this job because it was cancelled, or requeued by somebody else.
is_being_ended() {
  local state
  state=$(squeue --noheader --jobs="$JOB" --format="%T %r")
  # A job that is past its time limit may still be requeued.
  [[ $state == COMPLETING* && $state != *TimeLimit ]]
}

# run_step COMMAND...: run srun in the background, pass requests to stop on to it, leave its exit code in `code`.
run_step() {
  "$@" &
  step=$!
  # A trap ends `wait` early. The exit code of a child that ended meanwhile is kept for the last `wait`.
  wait "$step"
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  code=$?
  step=
}

# go_on_later CODE REASON: put the job back into the queue and end it; with CODE where that may not or cannot be.
go_on_later() {
  local code=$1 reason=$2
  if is_being_ended; then
    stop "$code" "$reason; the job was cancelled, or requeued by somebody else"
  elif [ "$RESTARTS" -ge "$MAX_RESTARTS" ]; then
    stop "$code" "$reason; it was restarted $RESTARTS times and MAX_RESTARTS is $MAX_RESTARTS"
  fi
  clean_up
  say "requeued: $reason (restart $((RESTARTS + 1)) of at most $MAX_RESTARTS)"
  scontrol requeue "$JOB" && exit 0
  stop "$code" "$reason; scontrol refused, so sbatch it again (was it submitted with --no-requeue?)"
}

# finish_well: end the job that is done.
finish_well() {
  clean_up
  say "done"
  exit 0
}

# stop CODE REASON: end the job for good.
stop() {
  clean_up
  say "not requeued: $2"
  exit "$1"
}

# submit OPTIONS...: sbatch from inside a job, without what Slurm has told this job alone.
submit() {
  local name
  local -a without=()
  for name in $(compgen -e SLURM_); do
    [ "$name" = SLURM_CONF ] || without+=(-u "$name")
  done
  env "${without[@]}" sbatch --parsable --partition="$SLURM_JOB_PARTITION" \
    ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} "$@"
}

# after_array NAME WORDS...: a job of one bigmix command that begins when all tasks of this array have ended. All tasks
# call this and the first one submits; where a task has failed, it is the command that finds out and says what is missing.
after_array() {
  local name=$1-$SLURM_ARRAY_JOB_ID job
  shift
  [ "$SLURM_ARRAY_TASK_ID" -eq "$SLURM_ARRAY_TASK_MIN" ] || return 0
  # An attempt before this one has submitted it already.
  [ -z "$(squeue --noheader --name="$name" --format=%i)" ] || return 0
  if job=$(submit --job-name="$name" --dependency="afterany:$SLURM_ARRAY_JOB_ID" \
    "$BIGMIX_ROOT/slurm/command.sbatch" "$@"); then
    say "job ${job%%;*} follows when all of the array have ended: bigmix $*"
  else
    say "could not submit what follows; when all of the array have ended: bigmix $*"
  fi
}

# check_array: the place of this task in the array, from 1, goes to `place`, and the number of tasks to `places`.
check_array() {
  local last=$(((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1))
  places=$SLURM_ARRAY_TASK_COUNT
  place=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1))
  [ "$last" -eq "$places" ] || refuse "the array has gaps: $places tasks from" \
    "$SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX; give all, such as --array=0-15 (what is done ends at once)"
}
