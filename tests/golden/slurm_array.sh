#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-1%1
#SBATCH --cpus-per-task=8
#SBATCH --error=OUT/jobs/slurm/%A_%a_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=2
#SBATCH --job-name=merit
#SBATCH --mem=64G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=OUT/jobs/slurm/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=2-00:00:00

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output OUT/jobs/slurm/%A_%a_%t_log.out --error OUT/jobs/slurm/%A_%a_%t_log.err python -u -m submitit.core._submit OUT/jobs/slurm

# job 0 of the array trains group 0: python -m accelerate.commands.launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes 2 --main_process_port 0 -m merit_hf.training PLAN --group 0 --output OUT/0 --num-processes 2
# job 1 of the array trains group 1: python -m accelerate.commands.launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes 2 --main_process_port 0 -m merit_hf.training PLAN --group 1 --output OUT/1 --num-processes 2
