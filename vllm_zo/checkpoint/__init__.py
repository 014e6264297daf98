"""What a job leaves behind: the seed log, snapshots, and adapters or merged models made from them."""
