"""Doubts about labels, and labels for pictures that have none."""
