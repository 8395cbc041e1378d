"""Jobs for SLURM or for this machine."""
