"""A run's model for others: a Hugging Face folder with a card made from the run, and its way to a hub."""
