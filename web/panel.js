/**
 * The panel on the patch nodes: how much is skipped against what was asked, and the live line.
 *
 * The server sends one event for every line that it shows, followed by the line as ComfyUI's own text on the node
 * (nodes/host.py). Without this script, or with a server side that sends no events, that text is all there is. Once
 * there is a panel it stands in for ComfyUI's text widget, under that widget's name, so that nothing is said twice.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "sparse_video_attention.run"; // RUN_EVENT in nodes/host.py
const NODES = new Set(["SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa"]);
// ComfyUI's name for its widget with a line of text; it looks for one before it makes one.
const WIDGET = "$$node-text-preview";
const MOST_HEIGHT = 168; // a longer text scrolls
const MARGIN = 8; // around it, on the classic canvas
const MOST_KEPT = 64;

/** The newest event of each node, by workflow and node: shown again when a workflow's tab is opened again. */
const newest = new Map();
/** Node -> its panel. */
const panels = new WeakMap();
/** The line of the newest event, of whichever workflow: its text, which follows it, is no news. */
let newestLine = null;

const STYLE = `
.sva-panel { box-sizing: border-box; width: 100%; min-height: 100%; overflow-y: auto; cursor: default; user-select: text;
  font: 11px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); --sva-colour: #4a90d9; }
.sva-panel[data-state="done"] { --sva-colour: #3fa45b; }
.sva-panel[data-state="stopped"] { --sva-colour: #8a8a8a; }
.sva-panel[data-state="warning"] { --sva-colour: #e0a030; }
.sva-inner { box-sizing: border-box; padding: 5px 7px; border-radius: 6px; background: var(--comfy-input-bg, #222);
  border-left: 3px solid var(--sva-colour); }
.sva-panel[data-state="warning"] .sva-inner { outline: 1px solid var(--sva-colour); outline-offset: -1px; }
.sva-panel[data-state="warning"] .sva-line { color: var(--sva-colour); font-weight: 600; }
.sva-head { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 8px; font-variant-numeric: tabular-nums; }
.sva-bar { position: relative; height: 8px; margin: 3px 0 5px; border-radius: 4px; overflow: hidden; background: var(--border-color, #4e4e4e); }
.sva-fill { height: 100%; background: var(--sva-colour); transition: width 0.2s; }
.sva-asked { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: var(--input-text, #fff); }
.sva-line { overflow-wrap: anywhere; }
.sva-panel:not([data-figures]) :is(.sva-head, .sva-bar) { display: none; }
`;

const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1;
const percent = (share) => `${(100 * share).toFixed(0)}%`;
const rootGraph = () => app.rootGraph ?? app.graph;

function element(name, ...children) {
  const made = document.createElement("div");
  made.className = `sva-${name}`;
  made.append(...children);
  return made;
}

/** What a node shows: a DOM widget that is saved neither with the workflow nor with the prompt. */
class Panel {
  constructor(node) {
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
    this.line = element("line");
    this.inner = element("inner", element("head", this.skipped, this.step), this.bar, this.line);
    this.root = element("panel", this.inner);
    this.widget = node.addDOMWidget(WIDGET, "sparse_video_attention_panel", this.root, {
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
    if (isShare(data.asked) && isShare(data.achieved)) {
      dataset.figures = "";
      this.skipped.textContent = `${percent(data.achieved)} skipped, ${percent(data.asked)} asked`;
      this.step.textContent = data.steps ? `step ${data.step}/${data.steps}` : "";
      this.fill.style.width = percent(data.achieved);
      this.asked.style.left = percent(data.asked);
      this.bar.setAttribute("aria-valuenow", (100 * data.achieved).toFixed(0));
      this.bar.setAttribute("aria-label", this.skipped.textContent);
      this.bar.title = `${data.sparse_calls} sparse, ${data.dense_calls} dense calls; the mark is what was asked`;
    } else {
      delete dataset.figures;
    }
    this.line.textContent = data.line;
    this.node.setDirtyCanvas?.(true, false);
  }
}

/** The patch node of an execution id; "12:5" is node 5 in the subgraph of node 12. Null where the graph on screen has none. */
function findNode(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(/^-?\d+$/.test(part) ? Number(part) : part) ?? null;
    graph = node?.subgraph;
  }
  return node && NODES.has(node.comfyClass ?? node.type) ? node : null;
}

function showOn(node, data) {
  let panel = panels.get(node);
  if (!panel || !node.widgets?.includes(panel.widget)) {
    const text = node.widgets?.find((widget) => widget.name === WIDGET); // from before there was a panel
    if (text) node.removeWidget?.(text);
    panel = new Panel(node);
    panels.set(node, panel);
  }
  panel.show(data);
}

function onRun({ detail: data }) {
  if (!data || typeof data.line !== "string" || data.node == null) return;
  newestLine = data.line;
  const key = `${data.workflow ?? ""}/${data.node}`;
  newest.delete(key); // so that the map stays in the order of the events
  newest.set(key, data);
  if (newest.size > MOST_KEPT) newest.delete(newest.keys().next().value);
  // The same id may be a node of another workflow, which is on screen while this one runs.
  if (data.workflow && data.workflow !== rootGraph()?.id) return;
  const node = findNode(data.node);
  if (node) showOn(node, data);
}

app.registerExtension({
  name: "sparse_video_attention.panel",
  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    api.addEventListener(EVENT, onRun);
  },
  /** A workflow was opened, or an undo has made all nodes anew. */
  afterConfigureGraph() {
    const workflow = rootGraph()?.id;
    if (!workflow || /^[0-]+$/.test(workflow)) return; // one that came as a prompt has no id of its own
    for (const data of newest.values()) {
      const node = data.workflow === workflow ? findNode(data.node) : null;
      if (node) showOn(node, data);
    }
  },
});
