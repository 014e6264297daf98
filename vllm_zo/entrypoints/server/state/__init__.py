"""The state that the server keeps over a restart: its directory, its records, its files."""
