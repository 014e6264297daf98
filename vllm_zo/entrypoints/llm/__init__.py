"""`LLM.finetune`, `LLM.evaluate` and their async twins. This package starts an engine with training and calls it."""
