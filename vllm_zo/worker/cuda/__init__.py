"""The CUDA side of a training worker: Triton kernels for LoRA, slots and scores, and copies to the host."""
