"use strict";

const INTERVAL = 1000; // milliseconds
const dialogues = document.getElementById("dialogues");
const connection = document.getElementById("connection");
let shown = "";

// Said only when it changes: screen readers read it aloud.
function report(state, text) {
  if (connection.dataset.state !== state) {
    connection.dataset.state = state;
    connection.textContent = text;
  }
}

// What did not change stays as it is, with what is selected in it.
function show(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").body;
  const now = new Map([...dialogues.children].map((element) => [element.id, element]));
  for (const message of shown ? fresh.querySelectorAll(".message") : []) {
    message.classList.toggle("new", !document.getElementById(message.id));
  }
  const merged = [...fresh.children].map((element) => {
    const old = now.get(element.id);
    return old?.isEqualNode(element) ? old : element;
  });
  dialogues.replaceChildren(...merged);
  shown = html;
}

async function refresh() {
  try {
    const response = await fetch("/dialogues", { signal: AbortSignal.timeout(10 * INTERVAL) });
    if (!response.ok) throw new Error(`${response.status}`);
    const html = await response.text();
    if (html !== shown) show(html);
    report("live", "Live");
  } catch {
    report("lost", "No connection, trying again");
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, INTERVAL));
  }
}

document.addEventListener("visibilitychange", () => document.hidden || refresh());
run();
