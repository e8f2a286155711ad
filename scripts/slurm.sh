#!/usr/bin/env bash
# train.py on SLURM: sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh [train.py's arguments…]
#
# One task a GPU. The workdir and cache_dir lie on a file system that all nodes share. SLURM sends SIGTERM two minutes
# before the time is up: all save at the same step and end, and `sbatch` with the same arguments goes on from there.
# Two racks of 72 GPUs that NVLink joins, 18 nodes of 4 each: sbatch --nodes=36 --segment=18 --gpus-per-node=4
# --ntasks-per-node=4 scripts/slurm.sh --config.mesh.replica=2 … (--segment keeps a replica's nodes in one block).
# IMAGE=FILE.sif runs it in an image (docs/hosts.md) instead of this Python's environment.
#SBATCH --job-name=bigmac
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
program=("${PYTHON:-python}" train.py)
[ -z "${IMAGE:-}" ] || program=(apptainer exec --nv "$IMAGE" bigmac train)
exec srun --kill-on-bad-exit=1 --label "${program[@]}" --distributed "$@"
