"""Keys of projects: who asks, what a project may see, and how much it may use.

key_file.py   the file of `vllm-zo keys` and `--zo-keys`: hashes of keys, projects and their limits
current.py    the project of the request that is being answered
adapters.py   vLLM's table of adapters, as the current project may see it
key_ring.py   the keys that a server knows, as the file has them now
limits.py     what a project has used, and 429
gate.py       the middleware: key -> project, routes, rate-limit headers, audit lines

The store (state/store.py) answers for the current project only, so no route can forget to ask.
"""
