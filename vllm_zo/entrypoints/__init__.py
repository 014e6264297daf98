"""The front ends: the class LLM, the command line and the server."""
