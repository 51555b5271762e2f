"""Everything that touches veRL: the agent loop, the frozen teacher, the trainer and its entry point."""
