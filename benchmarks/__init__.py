"""What vllm_zo is measured against, and the programs that measure it."""
