// The form for a new job. A recipe is a set of hyperparameters, which can be changed before the start.
const RECIPES = {
  "1000 steps": { steps: 1000 },
  "A quick look: 100 steps": { steps: 100 },
  "Longer, 4 directions a step: 3000 steps": { steps: 3000, queries: 4, estimator: "one-sided" },
  "Three passes over the data, as OpenAI's default": { n_epochs: 3 },
};

function showTask() {
  for (const node of document.querySelectorAll("#create [data-task]")) node.hidden = node.dataset.task !== $("task").value;
}

function showRecipe() { $("hyperparameters").value = JSON.stringify(RECIPES[$("recipe").value]); }

function parsed(id, what) {
  try { return JSON.parse($(id).value); } catch (error) { throw new Error(`${what}: ${error.message}`); }
}

function method() {
  const hyperparameters = parsed("hyperparameters", "Hyperparameters"), task = $("task").value;
  if (task === "supervised" || task === "dpo") return { type: task, [task]: { hyperparameters } };
  if (task === "reinforcement") return { type: task, reinforcement: { grader: parsed("grader", "Grader"), hyperparameters } };
  const objective = { name: "classification", template: $("template").value, options: $("options").value.split(",") };
  return { type: "zeroth_order", zeroth_order: { hyperparameters, objective } };
}

async function upload(input) {
  if (!input.files.length) return undefined;
  $("create-progress").textContent = "Uploading " + input.files[0].name;
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", input.files[0]);
  return (await (await call("/files", { method: "POST", body: form })).json()).id;
}

async function start() {
  const body = { model: $("model").value, method: method() };   // before the upload: it may be refused
  if ($("suffix").value) body.suffix = $("suffix").value;
  body.training_file = await upload($("train"));
  body.validation_file = await upload($("validation"));
  return post("/fine_tuning/jobs", body);
}

async function openForm() {
  const open = $("create").hidden;
  $("create").hidden = !open;
  $("new").setAttribute("aria-expanded", open);
  if (!open) return;
  $("train").focus();
  const bases = (await get("/models")).data.filter(model => !model.parent);
  $("model").replaceChildren(...bases.map(model => new Option(model.id)));
}

for (const name in RECIPES) $("recipe").append(new Option(name));
$("recipe").onchange = showRecipe;
$("task").onchange = showTask;
showRecipe();
showTask();
$("new").onclick = () => openForm().catch(complain);
$("create").onsubmit = async event => {
  event.preventDefault();
  $("start").disabled = true;
  $("create-error").textContent = "";
  try {
    const job = await start();
    $("create").hidden = true;
    $("new").setAttribute("aria-expanded", false);
    location.hash = job.id;
    await refresh();
  } catch (error) { $("create-error").textContent = error.key ? "The server does not take this key." : error.message; }
  $("create-progress").textContent = "";
  $("start").disabled = false;
};
