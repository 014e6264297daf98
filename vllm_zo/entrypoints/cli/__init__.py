"""The command `vllm-zo`."""
