"""The programs that measure vllm_zo, and the contenders that they compare it with."""
