/**
 * The panel on the patch nodes: how much is skipped, against the share or the error that was asked, and the live line. The nodes that only tell something
 * have one too, without figures: ComfyUI's own text widget cuts what is longer than two lines.
 *
 * The server sends one event for every line that it shows, followed by the line as ComfyUI's own text on the node
 * (nodes/host.py). Without this script, or with a server side that sends no events, that text is all there is. Once
 * there is a panel it stands in for ComfyUI's text widget, under that widget's name, so that nothing is said twice.
 *
 * A patch node inside a subgraph has a panel of its own, and so has every subgraph node around it: one for each patch within.
 * A prompt that leaves a patch node out sends nothing about it, so its panel is told by the start of that prompt.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "sparse_video_attention.run"; // RUN_EVENT in nodes/host.py
const PATCHES = new Set(["SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"]);
const TELLERS = new Set(["SparseAttentionProbe", "SparseAttentionProbeResults", "SparseAttentionSavePattern", "SparseAttentionLoadPattern"]);
// LiteGraph's modes of nodes that are no part of a prompt.
const LEFT_OUT = new Map([[2, "Muted"], [4, "Bypassed"]]);
const MOST_SHORT = 0.02; // a run that has skipped less than asked by more than this is no success
const MOST_OFF = 1.25; // nor one whose error, where that was asked for, is more than so many times it
// ComfyUI's name for its widget with a line of text; it looks for one before it makes one.
const WIDGET = "$$node-text-preview";
const TYPE = "sparse_video_attention_panel";
const MOST_HEIGHT = 168; // a longer text scrolls
const MARGIN = 8; // around it, on the classic canvas
const MOST_KEPT = 64;

/** The newest event of each node, by workflow and node: shown again when a workflow's tab is opened again. */
const newest = new Map();
/** Node -> its panels, by the execution id of the patch node that they are about. */
const panels = new WeakMap();
/** The line of the newest event, of whichever workflow: its text, which follows it, is no news. */
let newestLine = null;

const STYLE = `
.sva-panel { box-sizing: border-box; width: 100%; min-height: 100%; overflow-y: auto; cursor: default; user-select: text;
  font: 11px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); --sva-colour: #4a90d9; }
.sva-panel[data-state="done"] { --sva-colour: #3fa45b; }
.sva-panel[data-state="stopped"], .sva-panel[data-state="left out"] { --sva-colour: #8a8a8a; }
.sva-panel[data-state="warning"], .sva-panel[data-short] { --sva-colour: #e0a030; }
.sva-inner { box-sizing: border-box; padding: 5px 7px; border-radius: 6px; background: var(--comfy-input-bg, #222);
  border-left: 3px solid var(--sva-colour); }
.sva-panel[data-state="warning"] .sva-inner { outline: 1px solid var(--sva-colour); outline-offset: -1px; }
.sva-panel[data-state="warning"] .sva-line { color: var(--sva-colour); font-weight: 600; }
.sva-head { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 8px; font-variant-numeric: tabular-nums; }
.sva-bar { position: relative; height: 8px; margin: 3px 0 5px; border-radius: 4px; overflow: hidden; background: var(--border-color, #4e4e4e); }
.sva-fill { height: 100%; background: var(--sva-colour); transition: width 0.2s; }
.sva-asked { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: var(--input-text, #fff); }
.sva-line { overflow-wrap: anywhere; }
.sva-panel[data-state="left out"] .sva-line { color: var(--descrip-text, #999); }
.sva-title { font-weight: 600; overflow-wrap: anywhere; }
.sva-title:empty { display: none; }
.sva-panel:not([data-figures]) :is(.sva-head, .sva-bar) { display: none; }
`;

const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1;
const percent = (share) => `${(100 * share).toFixed(0)}%`;
/** As `percent` in nodes/status.py: errors may be small. */
const percentOff = (error) => (error >= 0.02 ? percent(error) : `${Number((100 * error).toPrecision(2))}%`);
const rootGraph = () => app.rootGraph ?? app.graph;
const kindOf = (node) => node.comfyClass ?? node.type;

function element(name, ...children) {
  const made = document.createElement("div");
  made.className = `sva-${name}`;
  made.append(...children);
  return made;
}

/** What a node shows: a DOM widget that is saved neither with the workflow nor with the prompt. */
class Panel {
  constructor(node, name) {
    this.node = node;
    this.height = 40;
    this.skipped = document.createElement("span");
    this.step = document.createElement("span");
    this.fill = element("fill");
    this.asked = element("asked");
    this.bar = element("bar", this.fill, this.asked);
    this.bar.setAttribute("role", "meter");
    this.bar.setAttribute("aria-valuemin", "0");
    this.bar.setAttribute("aria-valuemax", "100");
    this.title = element("title");
    this.line = element("line");
    this.inner = element("inner", this.title, element("head", this.skipped, this.step), this.bar, this.line);
    this.root = element("panel", this.inner);
    this.widget = node.addDOMWidget(name, TYPE, this.root, {
      serialize: false, // not in the prompt
      hideOnZoom: true,
      getValue: () => "",
      setValue: (text) => this.hostText(text),
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
      getMaxHeight: () => this.height + 2 * MARGIN,
    });
    this.widget.serialize = false; // not in the workflow
    // Words wrap as the node is wide, so the height is known once they are on the page.
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.inner);
  }

  /** Takes the room that the words need; while a run is under way it only grows, so that the node does not twitch. */
  fit() {
    const natural = Math.min(this.inner.offsetHeight, MOST_HEIGHT);
    if (!natural) return; // collapsed, or out of sight
    const height = this.root.dataset.state === "running" ? Math.max(this.height, natural) : natural;
    if (height === this.height) return;
    this.height = height;
    if (!globalThis.LiteGraph?.vueNodesMode) {
      const [, needed] = this.node.computeSize();
      if (this.node.size[1] < needed) this.node.setSize([this.node.size[0], needed]);
    }
    this.node.setDirtyCanvas?.(true, true);
  }

  /** A text of ComfyUI's own: the line of an event, or words from a server side that sends no events. */
  hostText(text) {
    if (typeof text === "string" && text && text !== newestLine) this.show({ state: "note", line: text });
  }

  show(data) {
    const { dataset } = this.root;
    dataset.state = data.state ?? "note";
    delete dataset.short;
    const ofShare = isShare(data.asked);
    if ((ofShare || isShare(data.asked_error)) && isShare(data.achieved)) {
      dataset.figures = "";
      const measured = typeof data.error === "number";
      const amiss = ofShare ? data.asked - data.achieved > MOST_SHORT + 1e-9 : measured && data.error > MOST_OFF * data.asked_error + 1e-9;
      if (data.state === "done" && amiss) dataset.short = "";
      const off = measured ? `, off by ${percentOff(data.error)}` : "";
      const asked = ofShare ? `${percent(data.asked)} asked` : `${percentOff(data.asked_error)}${measured ? "" : " off"} asked`;
      this.skipped.textContent = `${percent(data.achieved)} skipped${off}, ${asked}`;
      this.step.textContent = data.steps ? `step ${data.step}/${data.steps}` : "";
      this.fill.style.width = percent(data.achieved);
      this.asked.hidden = !ofShare;
      this.asked.style.left = ofShare ? percent(data.asked) : "";
      this.bar.setAttribute("aria-valuenow", (100 * data.achieved).toFixed(0));
      this.bar.setAttribute("aria-label", this.skipped.textContent);
      this.bar.title = `${data.sparse_calls} sparse, ${data.dense_calls} dense calls${ofShare ? "; the mark is what was asked" : ""}`;
    } else {
      delete dataset.figures;
    }
    this.line.textContent = data.line;
    this.node.setDirtyCanvas?.(true, false);
  }
}

/**
 * Our node of an execution id, after the subgraph nodes around it: "12:5" is node 5 in the subgraph of node 12. Empty where the
 * graph on screen has none.
 */
function findPath(id) {
  let graph = rootGraph();
  const path = [];
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(/^-?\d+$/.test(part) ? Number(part) : part);
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  const kind = kindOf(path.at(-1));
  return PATCHES.has(kind) || TELLERS.has(kind) ? path : [];
}

/** "Muted" or "Bypassed", where the node at a path's end or a subgraph node around it is. */
const leftOut = (path) => path.map((node) => LEFT_OUT.get(node.mode)).find(Boolean);

function drop(node, id) {
  const panel = panels.get(node)?.get(id);
  if (!panel) return;
  panels.get(node).delete(id);
  if (node.widgets?.includes(panel.widget)) node.removeWidget?.(panel.widget);
  node.setDirtyCanvas?.(true, true);
}

/** A node's panel about a patch node, made where there is none. */
function panelOn(node, id, name) {
  const own = panels.get(node) ?? new Map();
  panels.set(node, own);
  if (!node.widgets?.includes(own.get(id)?.widget)) {
    const text = node.widgets?.find((widget) => widget.name === name); // from before there was a panel
    if (text) node.removeWidget?.(text);
    own.set(id, new Panel(node, name));
  }
  return own.get(id);
}

function showOn(path, id, data) {
  const node = path.at(-1);
  const isPatch = PATCHES.has(kindOf(node));
  const shown = data.leftOut ? { state: "left out", line: `${data.leftOut}: without this node every call is dense.` } : data;
  // The instances of a subgraph share its nodes: the panel within is about the one that ran last, whether others are left out or not.
  const panel = panelOn(node, WIDGET, WIDGET);
  if (!data.leftOut || (panel.about ?? id) === id) {
    panel.about = id;
    panel.show(shown);
  }
  for (const around of isPatch ? path.slice(0, -1) : []) {
    try {
      const first = !panels.get(around)?.has(id);
      const panel = panelOn(around, id, `$$sparse-video-attention ${id}`);
      if (first) {
        const { onRemoved } = node; // the panel goes with its patch node
        node.onRemoved = function (...args) {
          onRemoved?.apply(this, args);
          drop(around, id);
        };
      }
      panel.title.textContent = node.title === node.constructor.title ? "" : node.title;
      panel.show(shown);
    } catch (error) {
      console.warn("sparse_video_attention: no panel on a subgraph node", error); // it is on the patch node within
    }
  }
}

/** A prompt begins: the patch nodes that it leaves out show no run, and those that it has again show theirs. */
function onStart() {
  const workflow = rootGraph()?.id;
  for (const data of newest.values()) {
    if (data.workflow && data.workflow !== workflow) continue;
    const path = findPath(data.node);
    if (!path.length || !PATCHES.has(kindOf(path.at(-1))) || !panels.has(path.at(-1))) continue;
    const now = leftOut(path);
    if (now === data.leftOut) continue;
    data.leftOut = now;
    showOn(path, String(data.node), data);
  }
}

function onRun({ detail: data }) {
  if (!data || typeof data.line !== "string" || data.node == null) return;
  newestLine = data.line;
  const key = `${data.workflow ?? ""}/${data.node}`;
  newest.delete(key); // so that the map stays in the order of the events
  newest.set(key, { ...data, leftOut: undefined });
  if (newest.size > MOST_KEPT) newest.delete(newest.keys().next().value);
  // The same id may be a node of another workflow, which is on screen while this one runs.
  if (data.workflow && data.workflow !== rootGraph()?.id) return;
  const path = findPath(data.node);
  if (path.length) showOn(path, String(data.node), data);
}

app.registerExtension({
  name: "sparse_video_attention.panel",
  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    api.addEventListener(EVENT, onRun);
    api.addEventListener("execution_start", onStart);
  },
  /** A workflow was opened, or an undo has made all nodes anew. */
  afterConfigureGraph() {
    const workflow = rootGraph()?.id;
    if (!workflow || /^[0-]+$/.test(workflow)) return; // one that came as a prompt has no id of its own
    for (const data of newest.values()) {
      const path = data.workflow === workflow ? findPath(data.node) : [];
      if (!path.length) continue;
      data.leftOut &&= leftOut(path);
      showOn(path, String(data.node), data);
    }
  },
});
