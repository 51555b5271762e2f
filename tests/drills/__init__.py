"""Fault drills: real processes of real runs are killed or frozen, disks are filled, and what happens is measured."""
