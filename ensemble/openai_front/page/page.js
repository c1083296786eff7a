"use strict";
// Whatever comes from the server is put in as text, never as HTML.

const byId = (id) => document.getElementById(id);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- talking

const conversation = [];
let model = null;
let running = null; // the AbortController of the answer that is coming

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const each of whole) {
      const data = each.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function show(role, text) {
  const made = element("div", `message ${role}`, text);
  byId("messages").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

async function ask(text) {
  const isChat = byId("kind").value === "chat";
  const asked = {
    model,
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (isChat) asked.messages = [...conversation, { role: "user", content: text }];
  else asked.prompt = text;
  show("user", text);
  const shown = show("assistant", isChat ? "" : text);
  const written = shown.firstChild ?? shown.appendChild(document.createTextNode(""));
  const note = shown.appendChild(element("span", "note"));
  const fail = (message) => { note.textContent = message; note.classList.add("bad"); };
  const sentAt = performance.now();
  let firstAt = null, answer = "", numTokens = 0, failed = false;
  running = new AbortController();
  setBusy(true);
  try {
    const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...(byId("key").value && { authorization: `Bearer ${byId("key").value}` }) },
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (response.status === 401) byId("key-row").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) numTokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        const piece = isChat ? choice.delta.content : choice.text;
        if (!piece) continue;
        firstAt ??= performance.now();
        answer += piece;
        written.appendData(piece);
        note.scrollIntoView({ block: "end" });
      }
    }
    const seconds = (performance.now() - firstAt) / 1000;
    const rate = numTokens > 1 && seconds > 0 ? `, ${((numTokens - 1) / seconds).toFixed(0)} tokens/s` : "";
    note.textContent = `${numTokens} tokens, first after ${((firstAt ?? sentAt) - sentAt).toFixed(0)} ms${rate}`;
  } catch (error) {
    failed = !answer;
    if (error.name === "AbortError") note.textContent = "stopped";
    else fail(error.message);
  } finally {
    running = null;
    setBusy(false);
  }
  if (isChat && !failed) conversation.push({ role: "user", content: text }, { role: "assistant", content: answer });
}

function setBusy(isBusy) {
  byId("stop").hidden = !isBusy;
  byId("send").disabled = isBusy;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value;
  if (running || !model || !text.trim()) return;
  byId("text").value = "";
  ask(text);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  byId("messages").replaceChildren();
});

// ---- the server now

const POLL_MS = 1000;
const WINDOW_S = 10; // of rates and means
const KEPT = 120; // samples of a chart
const samples = []; // {at, numbers, times}, the newest last
const charts = { rate: [], running: [], kv: [] };

const number = (value) => Number(value.toPrecision(3));
const time = (seconds) => (seconds === null ? "–" : seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`);
const put = (id, text) => { byId(id).textContent = text; };

function earlier() {
  const newest = samples.at(-1).at;
  return samples.find((each) => newest - each.at <= WINDOW_S);
}

function rate(name) {
  const [from, to] = [earlier(), samples.at(-1)];
  return to.at > from.at ? Math.max(0, to.numbers[name] - from.numbers[name]) / (to.at - from.at) : 0;
}

function mean(name) {
  const [from, to] = [earlier().times[name], samples.at(-1).times[name]];
  return to.count > from.count ? (to.sum - from.sum) / (to.count - from.count) : null;
}

function draw(name, value, text, least = 1) {
  const values = charts[name];
  values.push(value);
  if (values.length > KEPT) values.shift();
  const top = Math.max(least, ...values);
  const points = values.map((each, index) => `${KEPT - values.length + index},${100 - (95 * each) / top}`);
  const svg = byId(`${name}-chart`);
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${KEPT - 1} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.append(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  }
  svg.firstChild.setAttribute("points", points.join(" "));
  put(`${name}-now`, text);
}

function replicaRow(each) {
  const row = element("tr");
  const used = each.num_blocks - each.num_free_blocks;
  row.append(element("td", "", each.replica), element("td", each.role, each.role));
  row.append(element("td", each.state === "up" ? "" : "bad", each.state), element("td", "", each.device));
  row.append(element("td", "", each.num_requests));
  const blocks = row.appendChild(element("td"));
  const meter = blocks.appendChild(element("meter"));
  meter.max = Math.max(1, each.num_blocks);
  meter.value = used;
  blocks.append(`${used} of ${each.num_blocks}`);
  return row;
}

function showState(state) {
  model = state.model;
  put("model", `${model} · ${state.max_model_len} tokens`);
  const isThere = state.numbers && state.replicas;
  put("state", state.is_ready ? "serving" : isThere ? "takes no requests now" : "away: the Triton server does not answer");
  byId("state").className = state.is_ready ? "" : "bad";
  if (!isThere) return;
  samples.push({ at: performance.now() / 1000, numbers: state.numbers, times: state.times });
  if (samples.length > KEPT) samples.shift();
  const { numbers, replicas } = state;
  const booked = (roles) => replicas.filter((each) => roles.includes(each.role)).reduce((sum, each) => sum + each.num_requests, 0);
  put("waiting", numbers.waiting);
  put("queue-time", numbers.waiting ? `${numbers.waiting_tokens} tokens` : `waited ${time(mean("queue"))}`);
  put("in-prefill", booked(["prefill"]));
  put("prompt-rate", `${rate("prompt_tokens").toFixed(0)} tokens/s`);
  put("bridge", numbers.bridge);
  put("transfer", `${rate("transfers").toFixed(1)}/s, ${time(mean("transfer"))}`);
  put("in-decode", booked(["decode", "mixed"]));
  put("generation-rate", numbers.swapped ? `${numbers.swapped} swapped` : `${time(mean("itl"))}/token`);
  const outputRate = rate("later_tokens");
  draw("rate", outputRate, outputRate.toFixed(0));
  draw("running", numbers.running, numbers.running);
  const total = replicas.reduce((sum, each) => sum + each.num_blocks, 0);
  const free = replicas.reduce((sum, each) => sum + each.num_free_blocks, 0);
  const usage = total ? (100 * (total - free)) / total : 0;
  draw("kv", usage, `${usage.toFixed(0)} %`, 10);
  byId("replicas").replaceChildren(...replicas.map(replicaRow));
  for (const name of ["ttft", "itl", "e2e"]) put(name, time(mean(name)));
  put("answers", `${rate("answers").toFixed(1)}/s, ${numbers.answers} in all`);
  put("errors", `${numbers.errors} in all`);
  put("troubles", `${numbers.preemptions}, ${numbers.recoveries} in all`);
}

async function poll() {
  try {
    const response = await fetch("page/state");
    if (!response.ok) throw new Error(response.status);
    showState(await response.json());
  } catch {
    put("state", "away: the server does not answer");
    byId("state").className = "bad";
  }
  setTimeout(poll, document.hidden ? 10 * POLL_MS : POLL_MS);
}
poll();
