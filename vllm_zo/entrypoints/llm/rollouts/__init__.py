"""Rollouts: programs of the user that talk to the probes of an open group, and the server they talk to."""
