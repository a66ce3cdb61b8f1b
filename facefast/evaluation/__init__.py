"""What a model is worth; nothing learns here."""
