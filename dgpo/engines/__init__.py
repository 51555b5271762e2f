"""Generation engines outside RL: collection and evaluation play the project's one episode loop over vLLM."""
