"""A job on the server: the way from the request to the engine, and from the engine's answers to events."""
