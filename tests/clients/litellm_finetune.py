"""A script of a LiteLLM user: python litellm_finetune.py BASE_URL KEY MODEL FILE. Prints the name of the model."""

import sys
import time

import litellm
import openai

base, key, model, path = sys.argv[1:]
where = {"custom_llm_provider": "openai", "api_base": base, "api_key": key}

with open(path, "rb") as data:
    file = litellm.create_file(file=data, purpose="fine-tune", **where)
job = litellm.create_fine_tuning_job(
    model=model, training_file=file.id, hyperparameters={"n_epochs": 2}, suffix="litellm", seed=7, **where
)
assert job.id in [one.id for one in litellm.list_fine_tuning_jobs(limit=5, **where).data]
while (job := litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **where)).status not in (
    "succeeded",
    "failed",
):
    time.sleep(0.2)
assert job.status == "succeeded", job.error
assert job.seed == 7 and job.hyperparameters.n_epochs == 2

answer = litellm.completion(
    model=f"openai/{job.fine_tuned_model}",
    messages=[{"role": "user", "content": "is it good"}],
    max_tokens=4,
    api_base=base,
    api_key=key,
)
assert answer.choices[0].message.content is not None

other = litellm.create_fine_tuning_job(
    model=model, training_file=file.id, hyperparameters={"n_epochs": 10_000}, **where
)
assert litellm.cancel_fine_tuning_job(fine_tuning_job_id=other.id, **where).status in ("cancelled", "running")
try:
    litellm.retrieve_fine_tuning_job(fine_tuning_job_id="ftjob-none", **where)
    raise AssertionError("a job that does not exist was found")
except openai.NotFoundError as error:
    assert "No such job" in str(error)
assert litellm.file_delete(file_id=file.id, **where).deleted
print(job.fine_tuned_model)
