// A panel over the page that asks questions about pictures: one picture or two, one question, a key. Every answer is on
// the server's disk before the next question comes, so the panel holds nothing that could be lost. What is asked, and
// with which keys, is said by a kind: tournament.js and evaluation.js. Texts: locales/*/main.json, under the kind's name
// and, for what all kinds share, under erniePanel.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const SIDE_PX = 1600 // of the pictures side by side; zoom asks for up to FULL_PX
const FULL_PX = 8192
const ZOOM = 3
const RETRY_MS = 2000
const SHARED_KEYS = { s: 'skip', u: 'undo', Backspace: 'undo', z: 'zoom', Escape: 'close' }

const CSS = `
[data-ernie-panel] { position: fixed; inset: 0; z-index: 10000; display: flex; flex-direction: column; outline: none;
  background: #17181c; color: #e8e8ea; font: 15px/1.4 system-ui, sans-serif; user-select: none; }
[data-ernie-panel] header, [data-ernie-panel] footer { display: flex; align-items: center; gap: 12px; padding: 10px 16px; }
[data-ernie-panel] header > * { flex: 1; min-width: 0; }
[data-ernie-panel] .where div { color: #a9abb3; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
[data-ernie-panel] .where div + div { font-size: 13px; }
[data-ernie-panel] .ask { flex: 2; text-align: center; font-size: 20px; font-weight: 600; }
[data-ernie-panel] .prompt { font-size: 13px; font-weight: 400; color: #a9abb3; max-height: 3em; overflow: auto;
  user-select: text; }
[data-ernie-panel] .prompt:empty { display: none; }
[data-ernie-panel] .prompt.large { font-size: 16px; color: #e8e8ea; max-height: 7.5em; white-space: pre-line; }
[data-ernie-panel] .ask[data-hue="1"] > :first-child { color: #ffb86b; }
[data-ernie-panel] .ask[data-hue="0"] > :first-child { color: #8fc0ff; }
[data-ernie-panel] .far { display: flex; justify-content: flex-end; align-items: center; gap: 8px; white-space: nowrap; }
[data-ernie-panel] .bar { height: 4px; background: #2a2c33; }
[data-ernie-panel] .bar div { height: 100%; width: 0; background: #6aa5ff; transition: width .15s; }
[data-ernie-panel] main { flex: 1; min-height: 0; display: flex; gap: 8px; padding: 8px; }
[data-ernie-panel] .side { flex: 1; min-width: 0; position: relative; overflow: hidden; border: 3px solid transparent;
  border-radius: 8px; background: #101114; padding: 0; cursor: pointer; display: flex; align-items: center;
  justify-content: center; color: #a9abb3; font: inherit; }
[data-ernie-panel] .side:hover, [data-ernie-panel] .side:focus-visible { border-color: #4a6fb0; }
[data-ernie-panel] .side.chosen { border-color: #6aa5ff; }
[data-ernie-panel] .side img { position: absolute; width: 100%; height: 100%; object-fit: contain; }
[data-ernie-panel] .zoomed .side { cursor: zoom-out; }
[data-ernie-panel] .text { flex: 1; overflow: auto; padding: 24px; display: flex; flex-direction: column;
  align-items: center; gap: 16px; text-align: center; }
[data-ernie-panel] .text h2 { margin: 12px 0 0; font-size: 24px; }
[data-ernie-panel] .best { display: flex; flex-wrap: wrap; gap: 12px; justify-content: center; }
[data-ernie-panel] .best figure { margin: 0; width: 200px; }
[data-ernie-panel] .best img { width: 200px; height: 200px; object-fit: contain; background: #101114; border-radius: 6px; }
[data-ernie-panel] .list { display: flex; flex-direction: column; gap: 8px; width: min(720px, 100%); }
[data-ernie-panel] .list button { display: flex; justify-content: space-between; gap: 16px; text-align: left; }
[data-ernie-panel] button.key { background: #2a2c33; color: #e8e8ea; border: 1px solid #3d4049; border-radius: 6px;
  padding: 8px 14px; font: inherit; cursor: pointer; }
[data-ernie-panel] button.key:hover:not(:disabled) { background: #3a3d47; }
[data-ernie-panel] button.key:disabled { opacity: .4; cursor: default; }
[data-ernie-panel] kbd { font: 12px ui-monospace, monospace; color: #a9abb3; margin-left: 6px; }
[data-ernie-panel] footer { justify-content: center; flex-wrap: wrap; }
[data-ernie-panel] .news { min-height: 1.4em; text-align: center; color: #ffcc80; padding: 0 16px 8px; }
[data-ernie-panel] .news.calm { color: #7b7e87; font-size: 13px; }
`

// --- small things ----------------------------------------------------------------------------------------------------

const loaded = new Map() // texts by the kind's name

async function loadTexts (kind) {
  const locale = app.extensionManager?.setting?.get?.('Comfy.Locale') ?? 'en'
  try {
    const all = await (await api.fetchApi('/i18n')).json()
    loaded.set(kind.name, {
      ...all.en?.erniePanel, ...all.en?.[kind.name], ...all[locale]?.erniePanel, ...all[locale]?.[kind.name]
    })
  } catch {
    loaded.set(kind.name, {}) // the keys themselves are English words
  }
}

const sayIn = (kind) => (key, values = {}) =>
  (loaded.get(kind.name)?.[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ''))

export function element (tag, { on = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener)
  made.append(...children)
  return made
}

function duration (say, seconds) {
  if (seconds < 90) return say('seconds', { n: Math.max(1, Math.round(seconds)) })
  if (seconds < 5400) return say('minutes', { n: Math.round(seconds / 60) })
  return say('hours', { n: (seconds / 3600).toFixed(1) })
}

// What the server refused, with its status; a server that does not answer rejects with another error.
class Refused extends Error {
  constructor (status, text) {
    super(text)
    this.status = status
  }
}

async function ask (kind, path, body) {
  const options = body === undefined ? {} : {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body)
  }
  const response = await api.fetchApi(kind.route + path, { cache: 'no-store', ...options })
  const answer = await response.json().catch(() => ({}))
  if (!response.ok) throw new Refused(response.status, answer.error ?? response.statusText)
  return answer
}

const addressIn = (kind) => (id, number, side) => api.apiURL(`${kind.route}/${id}/pictures/${number}?side=${side}`)

// --- the panel -------------------------------------------------------------------------------------------------------

let panel = null // at most one

async function openPanel (kind, wanted = null) {
  if (panel) panel.close()
  await loadTexts(kind)
  panel = makePanel(kind)
  if (wanted) await panel.find(wanted)
  else await panel.showSessions()
}

function makePanel (kind) {
  const say = sayIn(kind)
  const pictureAddress = addressIn(kind)
  const before = document.activeElement
  let state = null // what the server said last: { [kind.session], questions }
  let busy = false
  let ready = false // all pictures can be seen
  let zoomed = false
  let closed = false
  let shown = 0 // counts the questions put up, so that pictures that come late are not taken for another one's
  let kept = [] // pictures fetched ahead

  const where = element('div')
  const question = element('div')
  const prompt = element('div', { className: 'prompt' })
  const asked = element('div', { className: 'ask' }, question, prompt)
  const count = element('div')
  const filled = element('div')
  const content = element('div', { style: 'flex:1; min-height:0; display:flex; flex-direction:column' })
  const keys = element('footer')
  const news = element('div', { className: 'news calm' })
  const button = (key, symbol, action) => {
    const made = element('button', { className: 'key', type: 'button', on: { click: action } }, say(key))
    if (symbol) made.append(element('kbd', { textContent: symbol }))
    made.dataset.action = key
    return made
  }
  const root = element('div', { id: kind.id, tabIndex: -1 },
    element('style', { textContent: CSS }),
    element('header', {}, element('div', { className: 'where' }, where, count),
      asked,
      element('div', { className: 'far' }, button('sessions', '', () => showSessions()),
        button('close', 'Esc', () => close()))),
    element('div', { className: 'bar' }, filled), content, news, keys)
  root.dataset.erniePanel = ''
  root.setAttribute('role', 'dialog')
  root.setAttribute('aria-modal', 'true')
  root.setAttribute('aria-label', say('title'))

  function onKey (event) {
    event.stopImmediatePropagation() // none of ComfyUI's shortcuts while the panel is open
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const keys = { ...(waiting() ? kind.keys(waiting()) : {}), ...SHARED_KEYS }
    const action = keys[event.key] ?? keys[event.key.toLowerCase()]
    if (!action) return
    const onButton = event.key === ' ' && document.activeElement?.matches?.('[data-ernie-panel] button.key')
    if (onButton && !waiting()) return
    event.preventDefault()
    if (!event.repeat) act(action)
  }
  const swallow = (event) => event.stopImmediatePropagation()
  window.addEventListener('keydown', onKey, true)
  window.addEventListener('keyup', swallow, true)
  document.body.append(root)
  root.focus()

  function close () {
    if (closed) return
    closed = true
    window.removeEventListener('keydown', onKey, true)
    window.removeEventListener('keyup', swallow, true)
    api.removeEventListener('execution_error', close)
    root.remove()
    if (panel?.root === root) panel = null
    before?.focus?.()
    if (state) kind.tellNodes(session())
  }

  const session = () => state[kind.session]
  const waiting = () => state?.questions?.[0] ?? null

  function tell (text, calm = false) {
    news.textContent = text
    news.classList.toggle('calm', calm)
  }

  function act (action) {
    if (action === 'close') return zoomed ? zoom() : close()
    if (action === 'zoom') return zoom()
    if (action === 'undo') return state && send('/undo', {})
    const now = waiting()
    // An answer is about pictures that were seen; what cannot be shown can be skipped.
    if (now && (ready || action === 'skip')) {
      root.querySelector(`.side.${action}`)?.classList.add('chosen')
      return send('/answer', { question: now.id, answer: action })
    }
  }

  // Run a request; while the server is away, wait for it and take what it says then.
  async function send (path, body) {
    if (busy || closed || !state) return
    busy = true
    const id = session().id
    try {
      show(await ask(kind, `/${id}${path}`, body))
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && error.status !== 409) tell(error.message)
      else await reload(id, error instanceof Refused && error.status === 409 ? say('elsewhere') : '')
    } finally {
      busy = false
    }
  }

  async function reload (id, text = '') {
    while (!closed) {
      try {
        show(await ask(kind, `/${id}`))
        if (text) tell(text)
        return
      } catch (error) {
        if (error instanceof Refused && error.status < 500) return tell(error.message)
        tell(say('offline'))
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS))
      }
    }
  }

  function show (next) {
    if (closed) return
    state = next
    const t = session()
    kind.tellNodes(t)
    zoomed = false
    where.textContent = `${t.name} \u00b7 ${t.annotator}`
    const total = t.done + t.left
    filled.style.width = `${total ? 100 * t.done / total : 0}%`
    const time = t.seconds_left && t.left ? say('timeLeft', { time: duration(say, t.seconds_left) }) : ''
    count.textContent = [say('progress', { done: t.done, total }), ...kind.place(t, say), time].filter(Boolean).join(' \u00b7 ')
    tell(say('saved'), true)
    if (waiting()) showQuestion()
    else if (t.stage === 'refused') showRefused()
    else showComplete()
  }

  function showQuestion () {
    const [now, ...later] = state.questions
    const id = session().id
    const turn = ++shown
    ready = false
    const heading = kind.ask(session(), now, say)
    question.textContent = heading.text
    if (heading.hue === undefined) delete asked.dataset.hue
    else asked.dataset.hue = heading.hue
    prompt.textContent = now.prompt
    prompt.classList.toggle('large', Boolean(kind.readsPrompt))
    const pictures = kind.pictures(now).map(([name, number]) => {
      const image = new Image()
      image.alt = say(name)
      image.draggable = false
      image.src = pictureAddress(id, number, SIDE_PX)
      const chooses = kind.pictures(now).length > 1
      const made = element('button', {
        className: `side ${name}`,
        type: 'button',
        on: { click: () => zoomed || !chooses ? zoom() : act(name) }
      }, say('loading'))
      made.setAttribute('aria-label', say(name))
      const done = image.decode().then(() => { made.replaceChildren(image); return true }, () => {
        made.replaceChildren(say('cannotShow'))
        return false
      })
      return { made, done }
    })
    content.replaceChildren(element('main', { on: { mousemove: pan } }, ...pictures.map((p) => p.made)))
    keys.replaceChildren(
      ...kind.answers(now).map(([name, symbol]) => button(name, symbol, () => act(name))),
      button('skip', 'S', () => act('skip')), button('undo', 'U', () => act('undo')),
      button('zoom', 'Z', () => act('zoom')))
    keys.querySelector('[data-action=undo]').disabled = !session().can_undo
    root.dataset.question = now.id
    root.dataset.ready = 'false'
    delete root.dataset.complete
    Promise.all(pictures.map((p) => p.done)).then((seen) => {
      if (turn !== shown || closed) return
      ready = seen.every(Boolean)
      root.dataset.ready = String(ready)
      kept = later.flatMap((q) => kind.pictures(q)).map(([, number]) => {
        const image = new Image()
        image.src = pictureAddress(id, number, SIDE_PX)
        return image
      })
    })
    root.focus()
  }

  function zoom () {
    const now = waiting()
    const main = content.querySelector('main')
    if (!now || !main) return
    zoomed = !zoomed
    main.classList.toggle('zoomed', zoomed)
    for (const [name, number] of kind.pictures(now)) {
      const image = main.querySelector(`.${name} img`)
      if (!image) continue
      image.style.transform = zoomed ? `scale(${ZOOM})` : ''
      const full = pictureAddress(session().id, number, FULL_PX)
      if (zoomed && !image.src.endsWith(full)) {
        const sharp = new Image()
        sharp.src = full
        sharp.decode().then(() => { image.src = full }, () => {})
      }
    }
  }

  // All pictures show the same place.
  function pan (event) {
    const side = event.target.closest?.('.side')
    if (!zoomed || !side) return
    const box = side.getBoundingClientRect()
    const x = 100 * (event.clientX - box.left) / box.width
    const y = 100 * (event.clientY - box.top) / box.height
    for (const image of content.querySelectorAll('.side img')) image.style.transformOrigin = `${x}% ${y}%`
  }

  function clear (title) {
    shown++
    ready = false
    zoomed = false
    kept = []
    question.textContent = title
    prompt.textContent = ''
    delete asked.dataset.hue
    delete root.dataset.question
    keys.replaceChildren()
  }

  const page = (...children) => content.replaceChildren(element('div', { className: 'text' }, ...children))

  function showRefused () {
    const t = session()
    clear(say('refused'))
    const hint = say('refusedHint', { right: t.calibration_right, total: t.calibration_total })
    page(element('h2', { textContent: say('refused') }), element('p', { textContent: hint }),
      button('tryAgain', '', () => send('/calibrate', {})))
  }

  async function showComplete () {
    const t = session()
    clear(say('complete'))
    const more = element('div')
    page(element('h2', { textContent: say('complete') }),
      element('p', { textContent: say('completeHint', { done: t.done, pictures: t.num_pictures }) }),
      button('run', '', () => { close(); app.queuePrompt(0, 1) }), more)
    keys.replaceChildren(button('undo', 'U', () => act('undo')))
    root.dataset.complete = 'true'
    try {
      const address = (number, side) => pictureAddress(t.id, number, side)
      more.append(...await kind.results?.(t, say, (path) => ask(kind, `/${t.id}${path}`), address) ?? [])
    } catch (error) {
      tell(error.message)
    }
  }

  async function showSessions () {
    if (state) kind.tellNodes(session())
    state = null
    clear(say('sessions'))
    where.textContent = ''
    count.textContent = ''
    filled.style.width = '0'
    tell('')
    try {
      const rows = (await ask(kind, ''))[kind.sessions].map((t) => {
        const how = t.complete ? say('sessionDone', { done: t.done })
          : say('sessionLeft', { left: t.left, done: t.done })
        const last = t.last_answer
          ? say('lastAnswer', { time: new Date(1000 * t.last_answer).toLocaleString() }) : ''
        return element('button', { className: 'key', type: 'button', on: { click: () => reload(t.id) } },
          element('span', { textContent: `${t.name} · ${t.annotator}` }),
          element('span', { textContent: [how, last].filter(Boolean).join(' · ') }))
      })
      if (rows.length) page(element('div', { className: 'list' }, ...rows))
      else page(element('p', { textContent: say('noSessions') }))
    } catch (error) {
      tell(error instanceof Refused ? error.message : say('offline'))
    }
  }

  // The tournament of this name and annotator; where there is none, the workflow has to run first.
  async function find (wanted) {
    const look = async () => (await ask(kind, ''))[kind.sessions].find(
      (t) => t.name === wanted.name && t.annotator === wanted.annotator)
    try {
      const found = await look()
      if (found) return await reload(found.id)
    } catch (error) {
      return tell(error instanceof Refused ? error.message : say('offline'))
    }
    clear(say('title'))
    const run = button('run', '', async () => {
      run.disabled = true
      tell(say('waiting'), true)
      // What ComfyUI has to say of a workflow that fails would lie behind the panel.
      api.addEventListener('execution_error', close, { once: true })
      await app.queuePrompt(0, 1) // what it returns is not the same thing in every version
      if (Object.keys(app.lastNodeErrors ?? {}).length) return close()
      while (!closed && !state) {
        await new Promise((resolve) => setTimeout(resolve, 700))
        const found = await look().catch(() => null)
        if (found && !state) return reload(found.id)
      }
    })
    page(element('p', { textContent: say('notRun', wanted) }), run)
  }

  return { root, close, find, showSessions }
}

// --- the node and the command ----------------------------------------------------------------------------------------

const widgetOf = (node, name) => node.widgets?.find((w) => w.name === name)

// Add a kind of panel to the page: its command, the button on its nodes, and what these know of it. A kind has
//   name, id, node, command, label, icon, route, session, sessions, told, widget: what it is called, here and there
//   keys(question), answers(question), pictures(question): key -> action; [action, symbol]; [name, number] of each
//   ask(session, question, say) -> { text, hue }, place(session, say) -> texts beside the count
//   results(session, say, ask, address) -> elements of the last page; optional
export function registerPanel (kind) {
  const say = sayIn(kind)

  // Which session a node means: by its widgets; where a widget is linked, as its last run said.
  function wantedBy (node) {
    const value = (name) => {
      const linked = node.inputs?.some((input) => input.widget?.name === name && input.link != null)
      return linked && node.ernieTold ? node.ernieTold[name] : String(widgetOf(node, name)?.value ?? '').trim()
    }
    return { name: value('name'), annotator: value('annotator') }
  }

  function label (node, t) {
    const button = widgetOf(node, kind.widget)
    if (!button) return
    button.label = !t ? say('open') : t.complete ? say('openDone') : say('openLeft', { left: t.left })
    node.setDirtyCanvas?.(true, true)
  }

  kind.tellNodes = (t) => {
    for (const node of app.graph?._nodes ?? []) {
      if (node.type !== kind.node) continue
      const wanted = wantedBy(node)
      if (wanted.name === t.name && wanted.annotator === t.annotator) label(node, t)
    }
  }

  app.registerExtension({
    name: kind.extension,
    commands: [{
      id: kind.command,
      label: kind.label,
      icon: kind.icon,
      function: () => {
        const chosen = Object.values(app.canvas?.selected_nodes ?? {}).find((node) => node.type === kind.node)
        return openPanel(kind, chosen ? wantedBy(chosen) : null)
      }
    }],
    menuCommands: [{ path: ['Extensions', 'ERNIE'], commands: [kind.command] }],

    async setup () {
      await loadTexts(kind)
      for (const node of app.graph?._nodes ?? []) if (node.type === kind.node) label(node, null)
    },

    beforeRegisterNodeDef (nodeType, nodeData) {
      if (nodeData.name !== kind.node) return
      const created = nodeType.prototype.onNodeCreated
      nodeType.prototype.onNodeCreated = function (...args) {
        const result = created?.apply(this, args)
        const button = this.addWidget('button', kind.widget, null, () => openPanel(kind, wantedBy(this)))
        button.serialize = false // no value: saved workflows have none for it
        label(this, null)
        return result
      }
      const executed = nodeType.prototype.onExecuted
      nodeType.prototype.onExecuted = function (output, ...args) {
        const result = executed?.apply(this, [output, ...args])
        const told = output?.[kind.told]?.[0]
        if (told) {
          this.ernieTold = told
          label(this, told)
        }
        return result
      }
    }
  })
}
