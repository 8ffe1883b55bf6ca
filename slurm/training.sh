# Sourced by the batch files that train: one attempt of a run, and whether another one follows.

# ask_to_stop SIGNAL: tell the ranks to save and exit with 75.
ask_to_stop() {
  asked=yes
  if [ "$1" = TERM ] && is_being_ended; then
    say "TERM: Slurm has told the ranks too"
    return
  fi
  say "$1: the ranks are asked to save a checkpoint and stop"
  # USR1 for TERM too: srun passes it on, while TERM makes it kill the ranks.
  [ -z "$step" ] || kill -USR1 "$step"
}

# newest OUTPUT: the name of the newest whole checkpoint.
newest() { cat "$1/checkpoints/latest" 2>/dev/null || echo "the beginning"; }

# count_failure OUTPUT: how often in a row attempts have failed at the newest checkpoint, this one counted in.
count_failure() {
  local file=$1/log/failures place count before
  place=$(newest "$1")
  { IFS=: read -r before count <"$file"; } 2>/dev/null
  [ "${before:-}" = "$place" ] || count=0
  mkdir -p "$1/log"
  echo "$place:$((count + 1))" >"$file"
  echo $((count + 1))
}

# finish CODE OUTPUT: end the job, or put it back into the queue.
finish() {
  local code=$1 output=$2 count place
  place=$(newest "$output")
  case $code in
    0) clean_up; say "done"; exit 0 ;;
    2) stop 2 "the input is bad; correct what is said above and sbatch it again" ;;
    75) rm -f "$output/log/failures"; go_on_later 75 "stopped on request at $place" ;;
  esac
  count=$(count_failure "$output")
  if [ "$count" -eq 1 ]; then
    go_on_later "$code" "failed with $code, for the first time at $place"
  fi
  stop "$code" "failed with $code, $count times in a row at $place; see above why, then sbatch it again"
}

# train RECIPE [key=value ...]: one attempt of a run; ends the job.
train() {
  local settings output
  asked='' step=''
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  prepare_job
  settings=$(bigmix recipe show "$@" --key output --key cache.folder) || finish_early $?
  { read -r output; read -r cache; } <<<"$settings"
  # What no recipe has changed lies in the home folder, which the nodes of many clusters share.
  [ "$cache" != "~/.cache/bigmix/shards" ] || set -- "$@" "cache.folder=$LOCAL/shards"
  # Somebody submitted it anew, so that failures of before may be mended.
  [ "$RESTARTS" -gt 0 ] || rm -f "$output/log/failures"
  set_meeting_point
  say "attempt $((RESTARTS + 1)) of $output from $(newest "$output"), $SLURM_NTASKS ranks on" \
    "$SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
  [ -z "$asked" ] || finish 75 "$output"
  run_ranks "$@"
  finish "$code" "$output"
}

# finish_early CODE: the recipe could not be read.
finish_early() {
  [ "$1" -eq 2 ] && finish 2 /nowhere
  stop "$1" "the recipe could not be read (code $1); see above why"
}

# run_ranks RECIPE [key=value ...]: one task for each GPU and no launcher between, so that signals reach the ranks.
run_ranks() {
  # kill-on-bad-exit: a rank that dies ends the step, and the others do not wait for it.
  # wait: a site may have srun end the step soon after its first rank, while the export is still being written.
  # gpu-bind: every rank sees the GPUs of its node and takes that of its SLURM_LOCALID; NCCL needs to see the others.
  # cpus-per-task: srun does not take it over from sbatch since Slurm 22.05.
  # label: each line begins with the rank that wrote it.
  run_step srun --label --kill-on-bad-exit=1 --wait=0 --gpu-bind=none \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${CONTAINER_OPTIONS[@]}" \
    "${PYTHON_WORDS[@]}" -u "$BIGMIX_ROOT/launch/train.py" "$@"
}
