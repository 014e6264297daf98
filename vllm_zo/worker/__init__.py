"""Inside the worker process: slots, adapter state, scoring and update."""
