"""Faces drawn from numbers, for those who have no photographs at hand."""
