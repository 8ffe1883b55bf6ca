# Sourced by the batch files that train: one attempt of a run, and whether another one follows.

# Where the failures in a row at a checkpoint are counted, in the output.
FAILURES=log/failures

# ask_to_stop SIGNAL: tell the ranks to save and exit with 75.
ask_to_stop() {
  asked=yes
  if [ "$1" = TERM ] && is_being_ended; then
    say "TERM: Slurm ends the job and has told the ranks"
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
  local file=$1/$FAILURES place count before
  place=$(newest "$1")
  { IFS=: read -r before count <"$file"; } 2>/dev/null
  [ "${before:-}" = "$place" ] || count=0
  mkdir -p "$1/log"
  echo "$place:$((count + 1))" >"$file"
  echo $((count + 1))
}

# finish CODE OUTPUT: end the job, or put it back into the queue.
finish() {
  local code=$1 output=$2 count=1 place
  place=$(newest "$output")
  case $code in
    0) finish_well ;;
    2) stop 2 "the input is bad; correct what is said above and sbatch it again" ;;
    75) rm -f "$output/$FAILURES"; go_on_later 75 "stopped on request at $place" ;;
  esac
  # An end from outside says nothing about the run.
  is_being_ended || count=$(count_failure "$output")
  if [ "$count" -eq 1 ]; then
    go_on_later "$code" "failed with $code, for the first time at $place"
  fi
  stop "$code" "failed with $code, $count times in a row at $place; see above why, then sbatch it again"
}

# train RECIPE [key=value ...]: one attempt of a run, after `begin`; ends the job.
train() {
  local settings output cache
  asked='' step=''
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  settings=$("${BIGMIX[@]}" recipe show "$@" --key output --key cache.folder) || finish_early $?
  { read -r output; read -r cache; } <<<"$settings"
  # The default lies in the home folder, which the nodes of most clusters share.
  # shellcheck disable=SC2088
  [ "$cache" != '~/.cache/bigmix/shards' ] || set -- "$@" "cache.folder=$LOCAL/shards"
  mkdir -p "$output/log"
  # Submitted anew: what failed before may be mended.
  [ "$RESTARTS" -gt 0 ] || rm -f "$output/$FAILURES"
  set_meeting_point
  say "attempt $((RESTARTS + 1)) of $output from $(newest "$output"), $SLURM_NTASKS ranks on" \
    "$SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
  [ -z "$asked" ] || finish 75 "$output"
  run_ranks "$output" "$@"
  finish "$code" "$output"
}

# finish_early CODE: the recipe could not be read.
finish_early() {
  [ "$1" -ne 2 ] || stop 2 "the recipe is bad; correct what is said above and sbatch it again"
  stop "$1" "the recipe could not be read (code $1); see above why"
}

# run_ranks OUTPUT RECIPE [key=value ...]: one task for each GPU, no launcher between; leaves their exit code in `code`.
run_ranks() {
  local first
  first=$(realpath "$1")/log/ended-$SLURM_JOB_ID-$RESTARTS
  shift
  rm -f "$first"
  # kill-on-bad-exit: a rank that dies ends the step, and the others do not wait for it.
  # wait: a site may let srun end the step soon after its first rank, while another still writes the export.
  # gpu-bind: a rank takes the GPU of its SLURM_LOCALID, and NCCL needs to see those of its neighbours.
  run_step srun --label --kill-on-bad-exit=1 --wait=0 --gpu-bind=none \
    "${CPUS[@]}" "${CONTAINER_OPTIONS[@]}" bash "$BIGMIX_ROOT/slurm/rank.sh" "$first" \
    "${PYTHON_WORDS[@]}" -u "$BIGMIX_ROOT/launch/train.py" "$@"
  if [ -s "$first" ]; then
    code=$(<"$first")
    rm "$first"
  fi
}
