#!/bin/bash
# Two machines of eight GPUs each: sbatch examples/distributed/slurm.sh run.yaml
# The run's folder, its data and its model must lie where both machines see them.
#SBATCH --job-name=fourfold
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SIGTERM two minutes before the time is over: the run saves a checkpoint. Submitted again, it goes on from there.
#SBATCH --signal=TERM@120

set -euo pipefail

config=${1:?give the YAML file of the run}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    -m fourfold train "$config" --resume_from_checkpoint auto
