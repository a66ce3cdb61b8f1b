"""A model on another machine."""
