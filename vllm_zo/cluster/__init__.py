"""One job on many engines: a coordinator that knows neither vLLM nor Ray, and what an engine does for it."""
