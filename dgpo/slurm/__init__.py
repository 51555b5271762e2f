"""Jobs for SLURM: stages as sbatch scripts, chained, that requeue and resume themselves (docs/slurm.md)."""
