"""Stages in order, each in a process of its own: the quickstart and the paper's tables."""
