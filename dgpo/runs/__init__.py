"""What a run leaves behind and how it survives: artifacts, checkpoints, stops, guards, alarms, rollback, watchdog."""
