# Sourced by the batch files that train: makes one attempt of a run, and decides whether another follows.

# The file in the output that counts failures in a row at one checkpoint.
FAILURES=log/failures

# request_stop SIGNAL: have the ranks save and end with 75.
request_stop() {
  stop_requested=yes
  if [ "$1" = TERM ] && is_being_ended; then
    say "TERM: Slurm is ending the job and has signalled the ranks"
    return
  fi
  say "$1: the ranks will save a checkpoint and stop"
  # USR1 in place of TERM as well: srun passes it on, while TERM makes it kill the ranks.
  [ -z "$step" ] || kill -USR1 "$step"
}

# newest OUTPUT: the name of the newest checkpoint.
newest() { cat "$1/checkpoints/latest" 2>/dev/null || echo "the beginning"; }

# count_failure OUTPUT: how many attempts in a row have failed at the newest checkpoint, this one included.
count_failure() {
  local file=$1/$FAILURES place count before
  place=$(newest "$1")
  { IFS=: read -r before count <"$file"; } 2>/dev/null
  [ "${before:-}" = "$place" ] || count=0
  mkdir -p "$1/log"
  echo "$place:$((count + 1))" >"$file"
  echo $((count + 1))
}

# finish CODE OUTPUT: end the job, or requeue it.
finish() {
  local code=$1 output=$2 count=1 place
  place=$(newest "$output")
  case $code in
    0) finish_done ;;
    2) stop 2 "the input is bad; correct what is reported above and submit it again" ;;
    75) rm -f "$output/$FAILURES"; requeue 75 "stopped on request at $place" ;;
  esac
  # A job that is ended from outside is no failure of the run.
  is_being_ended || count=$(count_failure "$output")
  if [ "$count" -eq 1 ]; then
    requeue "$code" "failed with $code, for the first time at $place"
  fi
  stop "$code" "failed with $code, $count times in a row at $place; see above why, then submit it again"
}

# train RECIPE [key=value ...]: make one attempt of a run, after `begin`; ends the job.
train() {
  local settings output cache
  stop_requested='' step=''
  trap 'request_stop USR1' USR1
  trap 'request_stop TERM' TERM
  settings=$("${BIGMIX[@]}" recipe show "$@" --key output --key cache.folder) || finish_early $?
  { read -r output; read -r cache; } <<<"$settings"
  # The default is in the home folder, which the nodes of most clusters share.
  # shellcheck disable=SC2088
  [ "$cache" != '~/.cache/bigmix/shards' ] || set -- "$@" "cache.folder=$LOCAL/shards"
  mkdir -p "$output/log"
  # This is a new submission: what failed before may have been corrected.
  [ "$RESTARTS" -gt 0 ] || rm -f "$output/$FAILURES"
  set_meeting_point
  say "attempt $((RESTARTS + 1)) of $output from $(newest "$output"), $SLURM_NTASKS ranks on" \
    "$SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
  [ -z "$stop_requested" ] || finish 75 "$output"
  run_ranks "$output" "$@"
  finish "$code" "$output"
}

# finish_early CODE: end a job whose recipe could not be read.
finish_early() {
  [ "$1" -ne 2 ] || stop 2 "the recipe is bad; correct what is reported above and submit it again"
  stop "$1" "the recipe could not be read (code $1); see above why"
}

# run_ranks OUTPUT RECIPE [key=value ...]: run one task per GPU, without another launcher; sets `code` to the exit code
# of the rank that failed first.
run_ranks() {
  local first
  first=$(realpath "$1")/log/ended-$SLURM_JOB_ID-$RESTARTS
  shift
  rm -f "$first"
  # kill-on-bad-exit: a rank that dies ends the step, so that the others do not wait for it.
  # wait: on some clusters srun ends the step soon after the first rank ends, while another still writes the export.
  # gpu-bind: a rank uses the GPU of its SLURM_LOCALID, and NCCL has to see those of the other ranks.
  run_step srun --label --kill-on-bad-exit=1 --wait=0 --gpu-bind=none \
    "${CPUS[@]}" "${CONTAINER_OPTIONS[@]}" bash "$BIGMIX_ROOT/slurm/rank.sh" "$first" \
    "${PYTHON_WORDS[@]}" -u "$BIGMIX_ROOT/launch/train.py" "$@"
  if [ -s "$first" ]; then
    code=$(<"$first")
    rm "$first"
  fi
}
