"""The agent, free of any engine: text grammar, the one episode loop, its record, search, scoring, plug-ins."""
