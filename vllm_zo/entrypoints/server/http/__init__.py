"""The routes, the objects that they answer with, and their errors."""
