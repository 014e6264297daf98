"""Several engines on one machine that train one job: `vllm_zo.Cluster` and `vllm-zo train --engines N`."""
