#!/usr/bin/env bash
# Two nodes with eight GPUs each: sbatch launch/slurm_pretrain.sh model_configs/7b.py [options of pretrain.py]
#SBATCH --job-name=internlm-ds
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
set -euo pipefail
config=${1:?usage: sbatch launch/slurm_pretrain.sh CONFIG [options]}
shift
# srun tells every task its rank (SLURM_PROCID); pretrain.py reads it, no launcher in between is needed
srun --kill-on-bad-exit=1 python "$(dirname "$0")/pretrain.py" --config "$config" --launcher slurm "$@"
