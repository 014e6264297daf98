"""Fine-tuned models: their names, and vLLM's serving objects."""
