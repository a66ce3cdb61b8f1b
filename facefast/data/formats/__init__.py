"""What data sets look like on disk: a reader for each layout."""
