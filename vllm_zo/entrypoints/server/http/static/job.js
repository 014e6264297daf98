const EVENTS = 200, SPEED_S = 20;   // events that are shown; seconds over which tokens/s is measured
const views = new Map();   // job id -> view: its card, and what has been read of it

function view(job) {
  let v = views.get(job.id);
  if (!v) {
    v = { points: { train: [], valid: [], train_acc: [], valid_acc: [] }, evaluations: [], events: [], tokens: [],
          after: "", stop: null, read: "", ...frame(job) };
    views.set(job.id, v);
  }
  v.job = job;
  return v;
}

// The nodes of a card stay the same while their texts change: a button keeps its focus, a box what is typed in it.
function frame(job) {
  const card = el("section", "card"), head = el("div", "row"), title = el("div", "grow"), link = el("a", "mono", job.id);
  card.id = job.id;
  card.setAttribute("aria-label", "Job " + job.id);
  link.href = "#" + job.id;
  const nodes = { card, about: el("div", "soft"), status: el("span", "status"), verbs: el("span", "row"), bar: el("div", "bar"),
                  progress: el("div", "soft progress"), model: el("div", "mono"), error: el("div", "error"),
                  charts: el("div", "charts"), key: legend(), details: el("div") };
  nodes.bar.setAttribute("role", "progressbar");
  nodes.bar.append(el("i"));
  nodes.key.hidden = true;
  title.append(link, nodes.about);
  head.append(title, nodes.status, nodes.verbs);
  card.append(head, nodes.bar, nodes.progress, nodes.model, nodes.error, nodes.charts, nodes.key, nodes.details);
  return nodes;
}

function progress(v) {
  const job = v.job, parts = [], first = v.tokens[0], last = v.tokens[v.tokens.length - 1];
  if (job.total_steps) parts.push(`step ${job.step} of ${job.total_steps}`);
  if (v.tokens.length > 1 && last[0] > first[0] && job.status === "running")
    parts.push(Math.round((last[1] - first[1]) / (last[0] - first[0])) + " tokens/s");
  if (job.estimated_finish) parts.push("about " + duration(job.estimated_finish - Date.now() / 1000) + " left");
  if (job.finished_at) parts.push("took " + duration(job.finished_at - job.created_at));
  return parts.join(" · ");
}

function verbs(status) {
  if (status === "queued" || status === "running") return ["pause", "cancel"];
  if (status === "paused") return ["resume", "cancel"];
  return status === "validating_files" || status === "pausing" ? ["cancel"] : [];
}

function button(job, verb) {
  const b = el("button", "", verb[0].toUpperCase() + verb.slice(1));
  b.dataset.verb = verb;
  b.setAttribute("aria-label", `${b.textContent} job ${job.id}`);
  b.onclick = async () => {
    if (verb === "cancel" && !confirm("Cancel " + job.id + "? Its last checkpoint stays usable.")) return;
    b.disabled = true;
    try { await call(`${of(job)}/${verb}`, { method: "POST" }); $("trouble").textContent = ""; }
    catch (error) { complain(error); }
    await refresh();
    b.disabled = false;
  };
  return b;
}

function draw(v) {
  const job = v.job, share = job.step / Math.max(job.total_steps, job.step, 1);
  v.about.textContent = `${job.model} · ${job.method.type}`;
  if (v.status.textContent !== job.status) {
    v.status.textContent = job.status;
    v.status.className = "status " + job.status;
    v.verbs.replaceChildren(...verbs(job.status).map(verb => button(job, verb)));
  }
  v.bar.firstChild.style.width = 100 * share + "%";
  v.bar.setAttribute("aria-valuenow", Math.round(100 * share));
  v.bar.setAttribute("aria-label", "Steps taken, in percent");
  v.progress.textContent = progress(v);
  v.model.textContent = job.fine_tuned_model || "";
  v.error.textContent = job.error ? job.error.message : "";
  if (v.points.train.length) {
    const p = v.points, total = job.total_steps || job.step;
    v.charts.replaceChildren(chart("loss (nats)", p.train, p.valid, total), chart("accuracy", p.train_acc, p.valid_acc, total));
    v.key.hidden = false;
  }
  detail(v);
}

function take(v, event) {
  v.after = event.id;
  const d = event.data;
  if (event.type === "message" || event.level !== "info") {
    v.events.unshift(event);
    v.events.length = Math.min(v.events.length, EVENTS);
  }
  if (!d) return;
  const add = (name, value) => { if (typeof value === "number") v.points[name].push([d.step, value]); };
  add("train", d.train_loss); add("train_acc", d.train_mean_token_accuracy);
  add("valid", d.full_valid_loss); add("valid_acc", d.full_valid_mean_token_accuracy);
  if (typeof d.full_valid_loss === "number") v.evaluations.unshift([d.step, d.full_valid_loss, d.full_valid_mean_token_accuracy]);
}

// --- a job's own view: #<job id> -------------------------------------------------------------------------------------

// A section is [title, make(v) -> {node, update()}, or null where the job has none]. Nodes are made when the view is
// opened, and stay.
const SECTIONS = [["Ask the base and the newest version", asking], ["Versions", versions], ["Evaluations", evaluations],
                  ["Example transcripts", transcripts], ["Configuration", configuration], ["Events", events]];

function detail(v) {
  const open = location.hash === "#" + v.job.id;
  v.details.hidden = !open;
  if (!open) return;
  if (!v.sections) {
    v.sections = SECTIONS.flatMap(([title, make]) => {
      const section = make(v), box = el("section");
      if (!section) return [];
      box.append(el("h2", "", title), section.node);
      box.setAttribute("aria-label", title);
      v.details.append(box);
      return section;
    });
  }
  for (const section of v.sections) section.update();
}

function evaluations(v) {
  const node = table(["step", "validation loss", "accuracy"], "Evaluations");
  node.classList.add("evaluations");
  return { node, update: () => node.fill(v.evaluations.map(e => e.map(number))) };
}

function transcripts(v) {
  if (v.job.method.zeroth_order?.objective?.name !== "rollout") return null;
  const node = el("div", "soft"), base = el("div"), newest = el("div");
  node.append(base, newest);
  let seen = "";
  const read = async () => {
    const found = await get(of(v.job) + "/transcripts");
    for (const [part, evaluation] of [[base, found.base], [newest, found.newest]])
      part.replaceChildren(...evaluation ? turns(evaluation) : []);
  };
  const update = () => {
    const now = v.job.status + v.evaluations.length;
    if (now !== seen) { seen = now; read().catch(complain); }
  };
  return { node, update };
}

function turns(evaluation) {
  const parts = [el("h3", "", evaluation.step ? "after step " + evaluation.step : "the base model")];
  for (const one of evaluation.rollouts) {
    parts.push(el("div", "", `row ${one.row + 1}: ` + (one.error || "reward " + one.reward)));
    for (const { role, text } of one.said) parts.push(el("div", "mono turn", role + ": " + text));
  }
  return parts;
}

function configuration(v) {
  const node = table(["option", "value"], "Configuration"), box = el("div", "scroll");
  box.tabIndex = 0;  // so that the arrow keys scroll it
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Configuration");
  box.append(node);
  const update = () => {
    const { hyperparameters, objective, grader, algorithm } = { algorithm: "", ...v.job.method[v.job.method.type] };
    const rest = { training_file: v.job.training_file, validation_file: v.job.validation_file, seed: v.job.seed, algorithm,
                   objective, grader };
    node.fill(Object.entries({ ...rest, ...hyperparameters }).filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]));
  };
  return { node: box, update };
}

function events(v) {
  const node = table(["time", "event"], "Events"), box = el("div", "scroll");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Events");
  box.append(node);
  let shown = "";
  const update = () => {
    const newest = v.events.length ? v.events[0].id : "";
    if (shown === newest) return;   // else it would lose its place every second
    shown = newest;
    node.fill(v.events.map(e => [new Date(1000 * e.created_at).toLocaleTimeString(), e.message]));
  };
  return { node: box, update };
}

function versions(v) {   // of a continual job one of them is live, and others can be promoted
  const node = table(["step", "model", "validation loss", "accuracy", ""], "Versions"), continual = v.job.method.zeroth_order?.continual;
  let seen = "";
  const act = (text, name, sure, path, method) => {
    const b = el("button", "", text);
    b.setAttribute("aria-label", `${text} ${name}`);
    b.onclick = async () => {
      if (!confirm(sure)) return;
      try { await call(path, { method }); await read(); } catch (error) { complain(error); }
    };
    return b;
  };
  const read = async () => {
    const page = await get(`${of(v.job)}/checkpoints?limit=100`), served = new Set((await get("/models")).data.map(m => m.id));
    const live = continual ? await get(of(v.job) + "/versions") : {};
    node.fill(page.data.map(c => {
      const name = c.fine_tuned_model_checkpoint, step = c.step_number, m = c.metrics, last = el("span", "row");
      if (!served.has(name)) last.append("deleted");
      else {
        if (continual && step === live.live) last.append("live");
        else if (continual) last.append(act("Promote", name, `Let ${name} answer live:${v.job.id}?`, `${of(v.job)}/versions/${step}/promote`, "POST"));
        if (continual && step === live.canary) last.append("canary");
        last.append(act("Delete", name, `Delete ${name}? Its files are removed.`, `/models/${encodeURIComponent(name)}?delete_files=true`, "DELETE"));
      }
      return [String(step), el("span", "mono", name), number(m.full_valid_loss), number(m.full_valid_mean_token_accuracy), last];
    }));
  };
  const update = () => {
    const now = v.job.status + v.events.filter(e => e.level === "info").length;
    if (now !== seen) { seen = now; read().catch(complain); }
  };
  return { node, update };
}

function asking(v) {
  const node = el("form"), box = el("textarea"), label = el("label", "", "Prompt"), kind = el("select"), go = el("button", "", "Ask both");
  const answers = el("div", "answers"), columns = [["base", v.job.model], ["newest", "job:" + v.job.id]];
  box.rows = 2;
  label.append(box);
  kind.setAttribute("aria-label", "Kind of request");
  for (const [value, text] of [["chat", "as a chat"], ["completion", "as a text to go on with"]]) kind.append(new Option(text, value));
  if (v.job.method.type === "zeroth_order") kind.value = "completion";
  answers.setAttribute("aria-live", "polite");
  const said = columns.map(([cls, model]) => {
    const column = el("div"), text = el("div", "said " + cls);
    column.append(el("div", "soft", cls === "base" ? `base (${model})` : `newest version (${model})`), text);
    answers.append(column);
    return text;
  });
  const row = el("div", "row");
  row.append(kind, go);
  node.append(label, row, answers);
  node.onsubmit = async event => {
    event.preventDefault();
    go.disabled = true;
    await Promise.all(columns.map(async ([, model], i) => {
      said[i].textContent = "...";
      try { said[i].textContent = await answer(kind.value, model, box.value); }
      catch (error) { said[i].textContent = error.key ? "The server does not take this key." : error.message; }
    }));
    go.disabled = false;
  };
  return { node, update: () => {} };
}

async function answer(kind, model, prompt) {
  const common = { model, max_tokens: 64, temperature: 0 };
  if (kind === "chat")
    return (await post("/chat/completions", { ...common, messages: [{ role: "user", content: prompt }] })).choices[0].message.content;
  return (await post("/completions", { ...common, prompt })).choices[0].text;
}
