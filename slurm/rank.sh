# rank.sh FILE COMMAND...: one rank of a step. The first to end otherwise than well leaves its exit code in FILE.
#
# srun tells the largest code of all ranks alone. Where one ends with 2 (bad input) it ends the others, whose 143 is more.

# Slurm signals the command as well. This shell waits for its end; a trap, unlike '', is not inherited by the command.
trap : USR1 TERM
set -o noclobber
file=$1
shift
"$@"
code=$?
[ "$code" -eq 0 ] || { echo "$code" >"$file"; } 2>/dev/null
# Each rank ends with 75 by itself: srun must not kill one that is still putting its things away.
[ "$code" -ne 75 ] || exit 0
exit "$code"
