"use strict";
// All text of models, people and the server goes in as textContent: nothing of it is ever read as HTML.
const $ = (id) => document.getElementById(id);
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed"];
const STANDARD = { temperature: "0.7", top_p: "1" };
let messages = [];
let live = null; // the answer that is coming: its AbortController

function store(kind, name, value) {
  try {
    const place = kind === "tab" ? sessionStorage : localStorage;
    if (value === undefined) return place.getItem(`fourfold.${name}`);
    place.setItem(`fourfold.${name}`, value);
  } catch { /* a browser that keeps nothing */ }
  return null;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, act) {
  const made = make("button", "", text);
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
}

// Code between fences, `code` and **strong**; everything else stays as it was written.
function render(place, text) {
  const parts = text.split(/^[ \t]*```[^\n`]*(?:\n|$)/m);
  place.replaceChildren();
  parts.forEach((part, index) => {
    if (index % 2) {
      const pre = make("pre");
      pre.append(make("code", "", part.replace(/\n$/, "")));
      place.append(pre);
      return;
    }
    const words = part.replace(/^\n+|\n+$/g, "");
    if (!words && parts.length > 1) return;
    const paragraph = make("p");
    for (const piece of words.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) paragraph.append(make("code", "", piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/.test(piece)) paragraph.append(make("strong", "", piece.slice(2, -2)));
      else if (piece) paragraph.append(piece);
    }
    place.append(paragraph);
  });
}

function follow(change) {
  const talk = $("talk");
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  change();
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    from.textContent = "Not allowed";
  }
  setTimeout(() => { from.textContent = "Copy"; }, 1200);
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function faultOf(response) {
  let said = `The server answered ${response.status}.`;
  try { said = (await response.json()).error.message; } catch { /* no JSON */ }
  if (response.status === 401) { showSettings(true); $("key").focus(); }
  if (response.status === 429) said += ". Try again in a moment.";
  return said;
}

async function loadModels() {
  const select = $("model");
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await faultOf(response));
    const { data } = await response.json();
    const before = store("page", "model");
    select.replaceChildren(...data.map(({ id, is_adapter: isAdapter, root }) => {
      const option = make("option", "", data.length > 1 && !isAdapter ? `${id} (base)` : id);
      option.value = id;
      if (root) option.title = `an adapter of ${root}`;
      return option;
    }));
    if (data.some(({ id }) => id === before)) select.value = before;
    select.disabled = false;
    $("fault-of-models")?.remove();
  } catch (error) {
    select.replaceChildren(make("option", "", "no model"));
    select.disabled = true;
    tellFault(error.message, "fault-of-models");
  }
  refresh();
}

function tellFault(text, id) {
  const fault = make("p", "turn fault", text);
  if (id) { $(id)?.remove(); fault.id = id; }
  follow(() => $("turns").append(fault));
  $("said").textContent = text;
  refresh();
}

function refresh() {
  $("empty").hidden = $("turns").childElementCount > 0;
  $("send").hidden = live !== null;
  $("stop").hidden = live === null;
  $("send").disabled = !$("text").value.trim() || $("model").disabled;
  for (const name of ["temperature", "top_p"]) $(`${name}-shown`).textContent = Number($(name).value).toFixed(2);
}

function showSettings(open) {
  $("settings").hidden = !open;
  $("open").setAttribute("aria-expanded", String(open));
  $("open").textContent = open ? "Close" : "Settings";
}

function body() {
  const system = $("system").value.trim();
  const asked = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("max_tokens").value) asked.max_tokens = Number($("max_tokens").value);
  if ($("seed").value) asked.seed = Number($("seed").value);
  return asked;
}

// The data of server-sent events.
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

function figures(state) {
  const end = state.last ?? performance.now();
  const spans = [];
  if (state.first !== null) {
    const seconds = (end - state.first) / 1000;
    const rate = make("span");
    if (state.tokens > 1 && seconds > 0) rate.append(make("b", "", ((state.tokens - 1) / seconds).toFixed(1)), " tokens/s");
    spans.push(rate, make("span", "", `first token ${((state.first - state.sent) / 1000).toFixed(2)} s`));
    spans.push(make("span", "", `${state.tokens} token${state.tokens === 1 ? "" : "s"}`));
  } else if (state.last === null) {
    spans.push(make("span", "", `waiting ${((performance.now() - state.sent) / 1000).toFixed(0)} s`));
  }
  if (state.reason) spans.push(make("span", "", state.reason));
  return spans.filter((span) => span.childNodes.length);
}

async function answer() {
  const asked = body();
  const conversation = messages; // a new chat begins another
  const turn = make("article", "turn model live");
  const words = make("div", "words");
  const foot = make("div", "foot");
  turn.append(make("div", "who", asked.model), words, foot);
  words.append(make("p"));
  follow(() => $("turns").append(turn));
  const control = new AbortController();
  live = control;
  refresh();
  const state = { sent: performance.now(), first: null, last: null, tokens: 0, reason: "" };
  let text = "";
  let shown = "";
  let fault = null;
  const show = () => follow(() => {
    if (text !== shown) render(words, text);
    shown = text;
    foot.replaceChildren(...figures(state));
  });
  const clock = setInterval(show, 80);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(asked), signal: control.signal,
    });
    if (!response.ok) throw new Error(await faultOf(response));
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const { error, choices, usage } = JSON.parse(data);
      if (error) throw new Error(error.message);
      if (usage) state.tokens = usage.completion_tokens;
      const choice = choices[0];
      if (!choice) continue;
      if (choice.delta.content) {
        text += choice.delta.content;
        state.first ??= performance.now();
        state.tokens += 1; // of pieces, until the server tells the number of tokens
      }
      if (choice.finish_reason) state.last = performance.now();
      if (choice.finish_reason === "length") state.reason = "cut off at the most tokens";
    }
  } catch (error) {
    if (control.signal.aborted) state.reason = "stopped";
    else fault = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  clearInterval(clock);
  state.last ??= performance.now();
  if (live === control) live = null;
  turn.classList.remove("live");
  if (fault !== null && !text) {
    turn.remove();
    tellFault(fault);
    $("turns").lastElementChild.append(" ", again());
    return;
  }
  show();
  if (fault !== null) tellFault(fault);
  // An answer that was stopped is one, too.
  conversation.push({ role: "assistant", content: text });
  foot.append(button("Copy", (from) => copy(text, from)), again());
  $("said").textContent = text ? `Answered: ${text}` : "An empty answer.";
  if (!text) words.replaceChildren(make("p", "", "(an empty answer)"));
  refresh();
}

// Asks the last question anew, of the model that is chosen now; the earlier answer stays to be compared.
function again() {
  return button("Ask again", () => {
    if (live) return;
    while (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length) answer();
  });
}

function ask() {
  const text = $("text").value.trim();
  if (!text || live || $("model").disabled) return;
  // After a question that was not answered, the new one stands in its place.
  if (messages.at(-1)?.role === "user") messages.pop();
  messages.push({ role: "user", content: text });
  for (const old of document.querySelectorAll(".foot button:last-child, .fault button")) if (old.textContent === "Ask again") old.remove();
  $("turns").append(make("div", "turn user", text));
  $("text").value = "";
  $("talk").scrollTop = $("talk").scrollHeight;
  answer();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") live?.abort(); });
$("text").addEventListener("input", refresh);
$("stop").addEventListener("click", () => live?.abort());
$("new").addEventListener("click", () => {
  live?.abort();
  messages = [];
  $("turns").replaceChildren();
  refresh();
  $("text").focus();
});
$("open").addEventListener("click", () => showSettings($("settings").hidden));
$("model").addEventListener("change", () => store("page", "model", $("model").value));
$("key").addEventListener("change", () => { store("tab", "key", $("key").value); loadModels(); });
for (const name of KEPT) {
  $(name).value = store("page", name) ?? STANDARD[name] ?? "";
  $(name).addEventListener("input", () => { store("page", name, $(name).value); refresh(); });
}
$("key").value = store("tab", "key") ?? "";
loadModels();
