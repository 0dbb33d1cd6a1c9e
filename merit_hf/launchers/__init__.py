"""Where groups are trained: in this process, beside it on this machine's GPUs, on Slurm, on HF Jobs."""
