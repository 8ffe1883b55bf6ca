# rank.sh FILE COMMAND...: run one rank of a step. The first rank that fails leaves its exit code in FILE.
#
# srun itself returns only the largest code of all ranks. If one ends with 2 (bad input), srun ends the others, whose
# code 143 is larger.

# Slurm signals the command as well, and this shell waits for its end. The command does not inherit a trap of `:`, as it
# would one of ''.
trap : USR1 TERM
set -o noclobber
file=$1
shift
"$@"
code=$?
[ "$code" -eq 0 ] || { echo "$code" >"$file"; } 2>/dev/null
# Each rank ends with 75 on its own: srun must not kill one that has not finished yet.
[ "$code" -ne 75 ] || exit 0
exit "$code"
