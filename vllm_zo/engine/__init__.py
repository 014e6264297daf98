"""The training side of EngineCore: jobs, perturbation groups, admission and the scheduler."""
