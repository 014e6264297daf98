"""A job as every part of the package knows it: its status, its files, its records."""
