"""The training side of vLLM's worker process: slots, adapter state, scoring and updates."""
