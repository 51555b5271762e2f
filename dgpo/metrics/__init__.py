"""Answer and search metrics, and their uncertainty."""
