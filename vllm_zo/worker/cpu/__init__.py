"""The CPU side of a training worker: linear layers, LoRA, attention, and forwards that leave out rows."""
