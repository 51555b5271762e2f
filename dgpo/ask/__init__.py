"""A checkpoint answers a question, and shows how: on the terminal, or on a page of this machine."""
