"""Kernels with a plain torch twin each."""
