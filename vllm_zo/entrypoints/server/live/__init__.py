"""Continual jobs on the server: rows that clients append, the version that is live, and feedback on answers."""
