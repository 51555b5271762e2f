"""Configuration: typed schema (every default lives there), Hydra composition, and checks before anything expensive."""
