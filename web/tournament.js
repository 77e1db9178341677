// The tournament's panel: two pictures, one question, a key. Every answer is on the server's disk before the next pair
// comes, so the panel holds nothing that could be lost. Routes: nodes/tournament.py. Texts: locales/*/main.json.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const NODE = 'ErnieTournament'
const COMMAND = 'Ernie.Tournament.Open'
const ROUTE = '/ernie/tournaments'
const SIDE_PX = 1600 // of the pictures side by side; zoom asks for up to FULL_PX
const FULL_PX = 8192
const ZOOM = 3
const RETRY_MS = 2000
const KEYS = {
  ArrowLeft: 'left', 1: 'left', ArrowRight: 'right', 2: 'right', ArrowDown: 'tie', ' ': 'tie', s: 'skip',
  u: 'undo', Backspace: 'undo', z: 'zoom', Escape: 'close'
}

const CSS = `
#ernie-tournament { position: fixed; inset: 0; z-index: 10000; display: flex; flex-direction: column; outline: none;
  background: #17181c; color: #e8e8ea; font: 15px/1.4 system-ui, sans-serif; user-select: none; }
#ernie-tournament header, #ernie-tournament footer { display: flex; align-items: center; gap: 12px; padding: 10px 16px; }
#ernie-tournament header > * { flex: 1; min-width: 0; }
#ernie-tournament .where div { color: #a9abb3; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
#ernie-tournament .where div + div { font-size: 13px; }
#ernie-tournament .ask { flex: 2; text-align: center; font-size: 20px; font-weight: 600; }
#ernie-tournament .prompt { font-size: 13px; font-weight: 400; color: #a9abb3; max-height: 3em; overflow: auto;
  user-select: text; }
#ernie-tournament .prompt:empty { display: none; }
#ernie-tournament .far { display: flex; justify-content: flex-end; align-items: center; gap: 8px; white-space: nowrap; }
#ernie-tournament .bar { height: 4px; background: #2a2c33; }
#ernie-tournament .bar div { height: 100%; width: 0; background: #6aa5ff; transition: width .15s; }
#ernie-tournament main { flex: 1; min-height: 0; display: flex; gap: 8px; padding: 8px; }
#ernie-tournament .side { flex: 1; min-width: 0; position: relative; overflow: hidden; border: 3px solid transparent;
  border-radius: 8px; background: #101114; padding: 0; cursor: pointer; display: flex; align-items: center;
  justify-content: center; color: #a9abb3; font: inherit; }
#ernie-tournament .side:hover, #ernie-tournament .side:focus-visible { border-color: #4a6fb0; }
#ernie-tournament .side.chosen { border-color: #6aa5ff; }
#ernie-tournament .side img { position: absolute; width: 100%; height: 100%; object-fit: contain; }
#ernie-tournament .zoomed .side { cursor: zoom-out; }
#ernie-tournament .text { flex: 1; overflow: auto; padding: 24px; display: flex; flex-direction: column;
  align-items: center; gap: 16px; text-align: center; }
#ernie-tournament .text h2 { margin: 12px 0 0; font-size: 24px; }
#ernie-tournament .best { display: flex; flex-wrap: wrap; gap: 12px; justify-content: center; }
#ernie-tournament .best figure { margin: 0; width: 200px; }
#ernie-tournament .best img { width: 200px; height: 200px; object-fit: contain; background: #101114; border-radius: 6px; }
#ernie-tournament .list { display: flex; flex-direction: column; gap: 8px; width: min(720px, 100%); }
#ernie-tournament .list button { display: flex; justify-content: space-between; gap: 16px; text-align: left; }
#ernie-tournament button.key { background: #2a2c33; color: #e8e8ea; border: 1px solid #3d4049; border-radius: 6px;
  padding: 8px 14px; font: inherit; cursor: pointer; }
#ernie-tournament button.key:hover:not(:disabled) { background: #3a3d47; }
#ernie-tournament button.key:disabled { opacity: .4; cursor: default; }
#ernie-tournament kbd { font: 12px ui-monospace, monospace; color: #a9abb3; margin-left: 6px; }
#ernie-tournament footer { justify-content: center; flex-wrap: wrap; }
#ernie-tournament .news { min-height: 1.4em; text-align: center; color: #ffcc80; padding: 0 16px 8px; }
#ernie-tournament .news.calm { color: #7b7e87; font-size: 13px; }
`

// --- small things ----------------------------------------------------------------------------------------------------

let texts = {}

async function loadTexts () {
  const locale = app.extensionManager?.setting?.get?.('Comfy.Locale') ?? 'en'
  try {
    const all = await (await api.fetchApi('/i18n')).json()
    texts = { ...all.en?.ernieTournament, ...all[locale]?.ernieTournament }
  } catch {
    texts = {} // the keys themselves are English words
  }
}

const say = (key, values = {}) =>
  (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ''))

function element (tag, { on = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener)
  made.append(...children)
  return made
}

function duration (seconds) {
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

async function ask (path, body) {
  const options = body === undefined ? {} : {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body)
  }
  const response = await api.fetchApi(ROUTE + path, { cache: 'no-store', ...options })
  const answer = await response.json().catch(() => ({}))
  if (!response.ok) throw new Refused(response.status, answer.error ?? response.statusText)
  return answer
}

const pictureAddress = (id, number, side) => api.apiURL(`${ROUTE}/${id}/pictures/${number}?side=${side}`)

// --- the panel -------------------------------------------------------------------------------------------------------

let panel = null // at most one

async function openPanel (wanted = null) {
  if (panel) panel.close()
  await loadTexts()
  panel = makePanel()
  if (wanted) await panel.find(wanted)
  else await panel.showSessions()
}

function makePanel () {
  const before = document.activeElement
  let state = null // what the server said last: { tournament, questions }
  let busy = false
  let ready = false // both pictures can be seen
  let zoomed = false
  let closed = false
  let shown = 0 // counts the pairs put up, so that pictures that come late are not taken for another pair's
  let kept = [] // pictures fetched ahead

  const where = element('div')
  const question = element('div')
  const prompt = element('div', { className: 'prompt' })
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
  const root = element('div', { id: 'ernie-tournament', tabIndex: -1 },
    element('style', { textContent: CSS }),
    element('header', {}, element('div', { className: 'where' }, where, count),
      element('div', { className: 'ask' }, question, prompt),
      element('div', { className: 'far' }, button('sessions', '', () => showSessions()),
        button('close', 'Esc', () => close()))),
    element('div', { className: 'bar' }, filled), content, news, keys)
  root.setAttribute('role', 'dialog')
  root.setAttribute('aria-modal', 'true')
  root.setAttribute('aria-label', say('title'))

  function onKey (event) {
    event.stopImmediatePropagation() // none of ComfyUI's shortcuts while the panel is open
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const action = KEYS[event.key] ?? KEYS[event.key.toLowerCase()]
    if (!action) return
    const onButton = event.key === ' ' && document.activeElement?.matches?.('#ernie-tournament button.key')
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
    if (state) tellNodes(state.tournament)
  }

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
    const id = state.tournament.id
    try {
      show(await ask(`/${id}${path}`, body))
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
        show(await ask(`/${id}`))
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
    const t = state.tournament
    tellNodes(t)
    zoomed = false
    where.textContent = `${t.name} · ${t.annotator}`
    const total = t.done + t.left
    filled.style.width = `${total ? 100 * t.done / total : 0}%`
    const round = t.round === 0 ? say('calibration') : say('round', { round: t.round, rounds: t.rounds })
    const time = t.seconds_left && t.left ? say('timeLeft', { time: duration(t.seconds_left) }) : ''
    count.textContent = [say('progress', { done: t.done, total }), round, time].filter(Boolean).join(' · ')
    tell(say('saved'), true)
    if (waiting()) showPair()
    else if (t.stage === 'refused') showRefused()
    else showComplete()
  }

  function showPair () {
    const [now, ...later] = state.questions
    const id = state.tournament.id
    const turn = ++shown
    ready = false
    question.textContent = state.tournament.question === 'Which one looks better?'
      ? say('question') : state.tournament.question
    prompt.textContent = now.prompt
    const side = (name) => {
      const image = new Image()
      image.alt = say(name)
      image.draggable = false
      image.src = pictureAddress(id, now[name], SIDE_PX)
      const made = element('button', {
        className: `side ${name}`, type: 'button', on: { click: () => zoomed ? zoom() : act(name) }
      }, say('loading'))
      made.setAttribute('aria-label', say(name))
      const done = image.decode().then(() => { made.replaceChildren(image); return true }, () => {
        made.replaceChildren(say('cannotShow'))
        return false
      })
      return { made, done }
    }
    const left = side('left'); const right = side('right')
    content.replaceChildren(element('main', { on: { mousemove: pan } }, left.made, right.made))
    keys.replaceChildren(
      button('left', '←', () => act('left')), button('tie', '↓', () => act('tie')),
      button('right', '→', () => act('right')), button('skip', 'S', () => act('skip')),
      button('undo', 'U', () => act('undo')), button('zoom', 'Z', () => act('zoom')))
    keys.querySelector('[data-action=undo]').disabled = !state.tournament.can_undo
    root.dataset.question = now.id
    root.dataset.ready = 'false'
    Promise.all([left.done, right.done]).then((seen) => {
      if (turn !== shown || closed) return
      ready = seen.every(Boolean)
      root.dataset.ready = String(ready)
      kept = later.flatMap((q) => [q.left, q.right]).map((number) => {
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
    for (const name of ['left', 'right']) {
      const image = main.querySelector(`.${name} img`)
      if (!image) continue
      image.style.transform = zoomed ? `scale(${ZOOM})` : ''
      const full = pictureAddress(state.tournament.id, now[name], FULL_PX)
      if (zoomed && !image.src.endsWith(full)) {
        const sharp = new Image()
        sharp.src = full
        sharp.decode().then(() => { image.src = full }, () => {})
      }
    }
  }

  // Both pictures show the same place.
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
    delete root.dataset.question
    keys.replaceChildren()
  }

  const page = (...children) => content.replaceChildren(element('div', { className: 'text' }, ...children))

  function showRefused () {
    const t = state.tournament
    clear(say('refused'))
    const hint = say('refusedHint', { right: t.calibration_right, total: t.calibration_total })
    page(element('h2', { textContent: say('refused') }), element('p', { textContent: hint }),
      button('tryAgain', '', () => send('/calibrate', {})))
  }

  async function showComplete () {
    const t = state.tournament
    clear(say('complete'))
    const best = element('div', { className: 'best' })
    page(element('h2', { textContent: say('complete') }),
      element('p', { textContent: say('completeHint', { done: t.done, pictures: t.num_pictures }) }),
      button('run', '', () => { close(); app.queuePrompt(0, 1) }), element('h3', { textContent: say('best') }), best)
    keys.replaceChildren(button('undo', 'U', () => act('undo')))
    root.dataset.complete = 'true'
    try {
      const ranking = await ask(`/${t.id}/ranking`)
      best.append(...ranking.best.map((one) => element('figure', {},
        element('img', { src: pictureAddress(t.id, one.number, 400), alt: one.label }),
        element('figcaption', { textContent: `${one.place}. ${one.label}` }))))
    } catch (error) {
      tell(error.message)
    }
  }

  async function showSessions () {
    if (state) tellNodes(state.tournament)
    state = null
    clear(say('sessions'))
    where.textContent = ''
    count.textContent = ''
    filled.style.width = '0'
    tell('')
    try {
      const { tournaments } = await ask('')
      const rows = tournaments.map((t) => {
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
    const look = async () => (await ask('')).tournaments.find(
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

// Which tournament a node means: by its widgets; where a widget is linked, as its last run said.
function wantedBy (node) {
  const value = (name) => {
    const linked = node.inputs?.some((input) => input.widget?.name === name && input.link != null)
    return linked && node.ernieTold ? node.ernieTold[name] : String(widgetOf(node, name)?.value ?? '').trim()
  }
  return { name: value('name'), annotator: value('annotator') }
}

function label (node, t) {
  const button = widgetOf(node, 'open_tournament')
  if (!button) return
  button.label = !t ? say('open') : t.complete ? say('openDone') : say('openLeft', { left: t.left })
  node.setDirtyCanvas?.(true, true)
}

function tellNodes (t) {
  for (const node of app.graph?._nodes ?? []) {
    if (node.type !== NODE) continue
    const wanted = wantedBy(node)
    if (wanted.name === t.name && wanted.annotator === t.annotator) label(node, t)
  }
}

app.registerExtension({
  name: 'ernie.tournament',
  commands: [{
    id: COMMAND,
    label: 'Open tournament (ERNIE)',
    icon: 'pi pi-images',
    function: () => {
      const chosen = Object.values(app.canvas?.selected_nodes ?? {}).find((node) => node.type === NODE)
      return openPanel(chosen ? wantedBy(chosen) : null)
    }
  }],
  menuCommands: [{ path: ['Extensions', 'ERNIE'], commands: [COMMAND] }],

  async setup () {
    await loadTexts()
    for (const node of app.graph?._nodes ?? []) if (node.type === NODE) label(node, null)
  },

  beforeRegisterNodeDef (nodeType, nodeData) {
    if (nodeData.name !== NODE) return
    const created = nodeType.prototype.onNodeCreated
    nodeType.prototype.onNodeCreated = function (...args) {
      const result = created?.apply(this, args)
      const button = this.addWidget('button', 'open_tournament', null, () => openPanel(wantedBy(this)))
      button.serialize = false // no value: saved workflows have none for it
      label(this, null)
      return result
    }
    const executed = nodeType.prototype.onExecuted
    nodeType.prototype.onExecuted = function (output, ...args) {
      const result = executed?.apply(this, [output, ...args])
      const told = output?.ernie_tournament?.[0]
      if (told) {
        this.ernieTold = told
        label(this, told)
      }
      return result
    }
  }
})
