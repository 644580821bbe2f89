// Builds the graphs of make_workflows.py in a real ComfyUI frontend, saves them as it does, and takes their pictures.
// OUT: a folder with workflows/ and subgraphs/ in it.
// node make_workflows.js PLAYWRIGHT_CORE PORT SPECS.json OUT write|check
const fs = require("fs")
const [playwright, port, specs, out, mode] = process.argv.slice(2)
const { chromium } = require(playwright)
const SIZE = { width: 2200, height: 1200 }

// In the page: stacks of groups from left to right, each group's nodes in columns, as high as the frontend wants them, never on one another.
async function build(spec) {
    const { app, LiteGraph } = window
    const rest = () => new Promise(done => setTimeout(done, 100))
    app.graph.clear()
    const nodes = {}
    const BESIDE = 60, BELOW = 70, EDGE = 20, TITLE = 90
    let x = 0, level = 0 // what is below the notes, so that wires run level
    for (const stack of spec.stacks) {
        let top = level, widest = 0
        for (const { title, columns } of stack) {
            let left = x, bottom = top
            for (const column of columns) {
                let y = top
                for (const [name, type, widgets = {}, options = {}] of column.nodes) {
                    const node = LiteGraph.createNode(type)
                    if (!node) throw new Error(`no node ${type}`)
                    app.graph.add(node)
                    nodes[name] = node
                    if (options.title) node.title = options.title
                    if (options.colors) [node.color, node.bgcolor] = options.colors
                    if (options.models) node.properties.models = options.models
                    for (const [key, value] of Object.entries(widgets)) {
                        const widget = node.widgets.find(w => w.name === key) ?? (type === "MarkdownNote" ? node.widgets[0] : null)
                        if (!widget) throw new Error(`${type} has no widget ${key}: ${node.widgets.map(w => w.name)}`)
                        widget.value = value
                    }
                    await rest()
                    const least = node.computeSize()
                    node.setSize([column.width, Math.max(least[1], options.height ?? 0)])
                    node.pos = [left, y]
                    y += node.size[1] + (options.room ?? 0) + BELOW
                }
                bottom = Math.max(bottom, y - BELOW)
                left += column.width + BESIDE
            }
            const group = new LiteGraph.LGraphGroup(title)
            app.graph.add(group)
            group.pos = [x - EDGE, top - TITLE]
            group.size = [left - BESIDE - x + 2 * EDGE, bottom - top + TITLE + 30]
            widest = Math.max(widest, left - BESIDE - x)
            top = bottom + TITLE + 70
            if (x === 0 && level === 0 && stack.length > 1) level = top
        }
        x += widest + 110
    }
    for (const [source, output, target, input] of spec.links) {
        const slot = nodes[target].findInputSlot(input)
        const out = typeof output === "number" ? output : nodes[source].findOutputSlot(output)
        if (slot < 0 || !nodes[source].connect(out, nodes[target], slot)) throw new Error(`${source}.${output} -> ${target}.${input}`)
    }
    await rest()
    return { ...app.graph.serialize(), id: spec.id }
}

// In the page: what was built, as one subgraph with inputs and outputs of its own, put into the library as a person does.
async function publish(spec) {
    const { app } = window
    const PREVIEW = "$$canvas-image-preview" // the frontend's name for the pictures that a node shows
    const rest = () => new Promise(done => setTimeout(done, 200))
    // Where the nodes are found after they have moved into the subgraph.
    for (const node of app.graph._nodes) node.properties.maker = spec.names[app.graph._nodes.indexOf(node)]
    for (const group of [...app.graph._groups]) app.graph.remove(group)
    const { subgraph, node: host } = app.graph.convertToSubgraph(new Set(app.graph._nodes))
    await rest()
    for (const input of [...subgraph.inputs]) subgraph.removeInput(input) // what the frontend has promoted unasked
    const inside = name => {
        const found = subgraph.nodes.find(node => node.properties.maker === name)
        if (!found) throw new Error(`no ${name}`)
        return found
    }
    for (const [name, ends] of spec.inputs) {
        const slots = ends.map(([node, slot]) => [inside(node), inside(node).inputs.find(input => input.name === slot)])
        if (slots.some(([, slot]) => !slot)) throw new Error(`${name}: ${JSON.stringify(ends)}`)
        const input = subgraph.addInput(name, String(slots[0][1].type))
        for (const [node, slot] of slots) if (!input.connect(slot, node)) throw new Error(`${name} does not connect`)
    }
    for (const [name, [[node, slot]]] of spec.outputs) {
        const output = inside(node).outputs.find(found => found.name === slot)
        if (!output || !subgraph.addOutput(name, String(output.type)).connect(output, inside(node))) throw new Error(`output ${name}`)
    }
    const shown = spec.shown.map((name, number) => ({
        name: PREVIEW + (number ? `_${number}` : ""), sourceNodeId: String(inside(name).id), sourcePreviewName: PREVIEW,
    }))
    for (const node of subgraph.nodes) delete node.properties.maker
    const left = Math.min(...subgraph.nodes.map(node => node.pos[0])), right = Math.max(...subgraph.nodes.map(node => node.pos[0] + node.size[0]))
    subgraph.inputNode.pos = [left - 260, 0]
    subgraph.outputNode.pos = [right + 100, 0]
    for (const ends of [subgraph.inputNode, subgraph.outputNode]) ends.arrange()
    host.title = subgraph.name = spec.name
    subgraph.description = spec.description
    await rest()
    host.setSize([360, host.computeSize()[1]])
    host.pos = [0, 0]
    app.canvas.selectItems([host])
    await app.extensionManager.command.execute("Comfy.PublishSubgraph", { metadata: { name: spec.name } })
    await rest()
    const answer = await app.api.fetchApi(`/userdata/${encodeURIComponent(`subgraphs/${spec.name}.json`)}`)
    const graph = JSON.parse(await answer.text())
    const [node] = graph.nodes
    node.properties.previewExposures = shown
    // Values stand in the nodes within, once.
    delete node.widgets_values
    delete node.widgets_values_named
    graph.last_node_id = Number(graph.last_node_id)
    graph.definitions.subgraphs[0].category = spec.category
    return graph
}

// In the page: an older file as the frontend saves it now.
async function resave(graph) {
    await window.app.loadGraphData(graph)
    await new Promise(done => setTimeout(done, 500))
    return window.app.graph.serialize()
}

async function fit() {
    const { app } = window
    const nodes = app.graph._nodes
    const all = [...nodes, ...app.graph._groups]
    const left = Math.min(...all.map(n => n.pos[0])) - 20, top = Math.min(...all.map(n => n.pos[1])) - 20
    const right = Math.max(...all.map(n => n.pos[0] + n.size[0])) + 20, bottom = Math.max(...all.map(n => n.pos[1] + n.size[1])) + 20
    const scale = Math.min(window.innerWidth / (right - left), window.innerHeight / (bottom - top))
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [-left, -top]
    app.canvas.deselectAll?.()
    app.canvas.setDirty(true, true)
    await new Promise(done => setTimeout(done, 800))
    return [Math.ceil((right - left) * scale), Math.ceil((bottom - top) * scale)]
}

async function check(graph) {
    // Loaded as a person does; what the frontend would call missing, and the form that it sends to the server.
    const { app, LiteGraph } = window
    await app.loadGraphData(structuredClone(graph))
    await new Promise(done => setTimeout(done, 500))
    const missing = app.graph._nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).map(n => n.type)
    const again = app.graph.serialize()
    // A node of an older ComfyUI may have fewer widgets at its end.
    const values = Object.fromEntries(graph.nodes.map(n => [n.id, n.widgets_values ?? []]))
    const same = again.nodes.every(n => JSON.stringify(n.widgets_values ?? []) === JSON.stringify(values[n.id].slice(0, n.widgets_values?.length ?? 0)))
    const design = document.querySelector("[data-node-id]") ? "Nodes 2.0" : "classic"
    return { missing, design, same, links: again.links.length, nodes: again.nodes.length, prompt: (await app.graphToPrompt()).output }
}

(async () => {
    const browser = await chromium.launch({
        executablePath: "/usr/bin/chromium",
        args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
    })
    for (const spec of JSON.parse(fs.readFileSync(specs))) {
        // A page of its own: values of a graph's widgets live on in the frontend, and go to nodes of the same number.
        const page = await browser.newPage({ viewport: SIZE })
        try {
            await page.goto(`http://127.0.0.1:${port}`)
            await page.waitForFunction(
                () => window.app?.graph && window.LiteGraph?.registered_node_types?.SparseAttentionReport, null, { timeout: 90000 },
            )
            await page.waitForTimeout(2500)
            await page.keyboard.press("Escape")
            if (spec.blueprint) {
                await page.evaluate(build, spec)
                const graph = await page.evaluate(publish, spec)
                fs.writeFileSync(`${out}/subgraphs/${spec.name}.json`, JSON.stringify(graph, null, 2) + "\n")
                console.log(JSON.stringify({ name: spec.name, nodes: graph.definitions.subgraphs[0].nodes.length }))
                continue
            }
            const graph = spec.graph ? (mode === "check" ? spec.graph : await page.evaluate(resave, spec.graph)) : await page.evaluate(build, spec)
            const found = await page.evaluate(check, graph)
            const answer = await page.evaluate(async prompt => {
                const got = await fetch("/prompt", { method: "POST", body: JSON.stringify({ prompt, client_id: "workflows" }), headers: { "Content-Type": "application/json" } })
                return { status: got.status, text: await got.text() }
            }, found.prompt)
            const lost = found.missing.length || !found.same || graph.nodes.length !== found.nodes || graph.links.length !== found.links
            const errors = answer.status !== 200 || Object.keys(JSON.parse(answer.text).node_errors).length
            console.log(JSON.stringify({ name: spec.name, design: found.design, missing: found.missing, same: found.same, nodes: [graph.nodes.length, found.nodes], links: [graph.links.length, found.links], status: answer.status }))
            if (lost || errors) throw new Error(answer.text.slice(0, 1500))
            if (mode === "check") continue
            // Only the graph: what else lies over the canvas is hidden.
            await page.addStyleTag({ content: `
                body * { visibility: hidden !important }
                #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important }` })
            await page.evaluate(() => { window.app.canvas.show_info = false })
            const [width, height] = await page.evaluate(fit)
            await page.screenshot({ path: `${out}/workflows/${spec.name}.jpg`, type: "jpeg", quality: 70, clip: { x: 0, y: 0, width: Math.min(width, SIZE.width), height: Math.min(height, SIZE.height) } })
            fs.writeFileSync(`${out}/workflows/${spec.name}.json`, JSON.stringify(graph, null, 2) + "\n")
        } catch (error) {
            console.log(JSON.stringify({ name: spec.name, error: String(error) }))
            process.exitCode = 1
        } finally {
            await page.close()
        }
    }
    await browser.close()
})()
