"""Callbacks that watch a run: a progress bar, and those that send its numbers to an experiment tracker (report.py)."""
