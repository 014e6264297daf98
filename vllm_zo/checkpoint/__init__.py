"""The results of a job on disk: the seed log, snapshots, and the adapters or merged models made from them."""
