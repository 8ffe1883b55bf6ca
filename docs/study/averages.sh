#!/usr/bin/env bash
# Averages of the base with the one-way models of a task, evaluated as the runs are: bash docs/study/averages.sh gsm8k base-en books
set -euo pipefail
task=${1:?usage: bash docs/study/averages.sh TASK BASE REPLAY_SOURCE}
base=runs/study/${2:?a base, such as base-en}/export replay=${3:?the replay source, such as books}

for tuned in runs/study/"$task/$replay"-0/seed-*; do
  for weight in 0.25 0.5 0.75; do
    out=runs/study/$task/average-$weight/$(basename "$tuned")
    [ -f "$out/evaluation.json" ] && continue
    bigmix average "$base" "$tuned/export" --weight "$weight" --output "$out/model"
    bigmix evaluate "docs/study/$task.yaml" "sweep.only=$replay-0/$(basename "$tuned")" --model "$out/model" --base "$base" --output "$out" --ranks 2
  done
done
