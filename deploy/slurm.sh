#!/bin/bash
# A model over all nodes of a job: sbatch --nodes=4 slurm.sh MODEL PROMPT
#SBATCH --job-name=lingualinked
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=01:00:00
set -euo pipefail

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

# 1) a daemon on each node, for this job alone, reached by the name that Slurm has for its node; 2 GiB are left to it and to this script
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'exec lingualinked worker --once --wait 300 \
    --bind tcp://0.0.0.0:0 --advertise "$SLURMD_NODENAME" --name "$SLURMD_NODENAME" \
    --threads "$SLURM_CPUS_PER_TASK" --memory "$((SLURM_MEM_PER_NODE - 2048))MiB"' >"$lines" &
daemons=$!

# 2) all listen, or one has failed and the others have been ended
until [ "$(wc -l <"$lines")" -eq "$SLURM_JOB_NUM_NODES" ]; do
    kill -0 "$daemons" 2>/dev/null || { echo "a daemon did not start: its error is above" >&2; exit 1; }
    sleep 0.2
done

# 3) use them
lingualinked generate "$1" "$2" --devices "$(cat "$lines")"

# 4) they end, since their caller is gone
wait "$daemons"
