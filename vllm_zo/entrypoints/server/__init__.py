"""The OpenAI-compatible training server: files, fine-tuning jobs and models beside vLLM's own routes.

launch.py           `vllm-zo serve`: vLLM's own server, with the plugin and the engine options for training
plugin.py           what vLLM loads: attaches the routes, opens the state directory, starts the runner
settings.py         what an operator may set
context.py          everything that the routes work with
metrics.py          Prometheus

http/               what clients send and get
  routes_*.py       the routes, by what they are about; page.py and static/: GET /fine-tuning
  schemas.py        objects as the OpenAI SDK expects them
  errors.py         the error envelope, the limit on request bodies, full disks
  events.py         server-sent events
  fold_guard.py     409 for requests beside a running `fold` job
jobs/               a job from the request to its model
  request.py        a create request -> options of a `JobConfig`, every value resolved
  create.py         a request that can work becomes a job
  prepare.py        its files become the engine's job directory; chat.py: chats -> prompt and completion
  runner.py         a task for every unfinished job; pause, resume, cancel
  follow.py         one job in the engine: its answers become events (progress.py) and statuses
  outcome.py        checkpoints, the model and the result file; wandb_run.py: Weights & Biases
keys/               projects: whose key asks, what it may see, how much it may use
models/             names.py: names of fine-tuned models; vllm_models.py: the one place that reaches into vLLM's own
state/              directory.py: where everything is kept, for its owner alone
  store.py          SQLite: files, jobs (job_record.py), events, checkpoints, models
  files.py          uploaded files, checked line by line

A job's settings take four forms: the request's body (kept in the job's record) -> `JobConfig` -> job.json -> the
engine's `Job`.
"""
