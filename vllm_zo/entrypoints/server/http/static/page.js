const POLL_MS = 1000, PAGE = 20, PAGES = 20, STREAMS = 3, LIVE = ["validating_files", "running", "pausing"];
let shown = PAGE, streams = 0;

async function follow(v) {  // live; EventSource cannot send the key, so the stream is read by hand
  streams += 1;
  v.stop = new AbortController();
  try {
    const after = v.after ? "&after=" + encodeURIComponent(v.after) : "";
    const response = await call(`${of(v.job)}/events?stream=true${after}`, { signal: v.stop.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const blocks = (rest + part.value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").find(line => line.startsWith("data: "));
        if (data && data !== "data: [DONE]") take(v, JSON.parse(data.slice(6)));
      }
      draw(v);
    }
  } catch (error) { if (error.name !== "AbortError") throw error; }
  finally { streams -= 1; v.stop = null; }
}

async function history(v) { // of a job that rests or has ended: its newest events, at most PAGES * 1000
  v.read = v.job.status;
  const events = [];
  let after = "";
  for (let page, n = 0; n < PAGES && (!page || page.has_more); n++) {
    page = await get(`${of(v.job)}/events?limit=1000${after}`);
    const known = page.data.findIndex(event => event.id === v.after);
    events.push(...(known < 0 ? page.data : page.data.slice(0, known)));
    if (known >= 0 || !page.data.length) break;
    after = "&after=" + encodeURIComponent(page.last_id);
  }
  for (const event of events.reverse()) take(v, event);
  draw(v);
}

async function catchUp(v) {
  const live = LIVE.includes(v.job.status);
  if (!live && v.stop) v.stop.abort();   // a browser has few connections: none for a job that rests
  if (live && !v.stop && streams < STREAMS) { v.read = ""; await follow(v); }
  if (!live && v.read !== v.job.status) await history(v);
}

function complain(error) {
  if (!error.key) { $("trouble").textContent = error.message; return; }
  $("login-error").textContent = key ? "The server does not take this key." : "";
  $("login").hidden = false;
  $("jobs").replaceChildren();
  views.clear();
}

async function wanted() {   // all jobs, or the one of `#<job id>`
  const id = location.hash.slice(1);
  return id ? { data: [await get(of({ id }))], has_more: false } : get(`/fine_tuning/jobs?limit=${shown}`);
}

async function refresh() {
  const page = await wanted(), now = Date.now() / 1000;
  $("login").hidden = true;
  $("trouble").textContent = "";
  $("empty").hidden = page.data.length > 0;
  $("more").hidden = !page.has_more;
  const running = page.data.filter(job => LIVE.includes(job.status)).length;
  $("summary").textContent = running ? running + " under way" : "";
  const cards = page.data.map(job => {
    const v = view(job);
    v.tokens = [...v.tokens.filter(([time]) => time > now - SPEED_S), [now, job.trained_tokens || 0]];
    draw(v);
    return v.card;
  });
  if ($("jobs").children.length !== cards.length || cards.some((card, i) => $("jobs").children[i] !== card)) $("jobs").replaceChildren(...cards);
  for (const job of page.data) catchUp(views.get(job.id)).catch(complain);
}

async function loop() {
  try { if ($("login").hidden || key) await refresh(); } catch (error) { complain(error); if (error.key) key = ""; }
  setTimeout(loop, POLL_MS);
}

function paint(theme) { document.documentElement.dataset.theme = theme; }

$("login").onsubmit = event => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("zo-key", key);
  $("key").value = "";
  refresh().catch(error => { complain(error); if (error.key) key = ""; });
};
$("more").onclick = () => { shown = Math.min(shown + PAGE, 1000); refresh().catch(complain); };
$("theme").onclick = () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("zo-theme", theme);
  paint(theme);
};
window.onhashchange = () => { refresh().catch(complain); };
paint(localStorage.getItem("zo-theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
loop();
