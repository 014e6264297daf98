"""The OpenAI-compatible training server: files, fine-tuning jobs and models beside vLLM's own routes.

plugin.py       what vLLM loads: attaches the routes, opens the state directory, starts the runner
launch.py       `vllm-zo serve`: vLLM's own server with the plugin and the engine options for training
settings.py     what an operator may set
state_dir.py    where everything is kept, and who owns it
store.py        SQLite: files, jobs, events, checkpoints, models
errors.py       the error envelope, and the limit on request bodies
wire.py         objects as the OpenAI SDK expects them
job_request.py  a create request -> JobConfig options, every value resolved
chat.py         chat records -> prompt and completion
uploads.py      checking and keeping uploaded files
create_job.py   a request that can work becomes a job; prepare.py: its files become the engine's
runner.py       which job runs when (turns.py); follow.py: one job from start to end (progress.py, exports.py)
events.py       server-sent events
models.py       names of fine-tuned models; serving.py: the one place that reaches into vLLM's serving objects
fold_guard.py   nobody beside a `fold` job
metrics.py      Prometheus; wandb_run.py: Weights & Biases
service.py      what the routes work with
routes_*.py     the routes; page.html: GET /fine-tuning
"""
