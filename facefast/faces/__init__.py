"""Where the face is, before anything else looks at it."""
