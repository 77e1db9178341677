// Compare Images: two pictures over each other on the node, with a divider to drag. The wheel zooms about the pointer,
// dragging with Shift or the middle button moves what is zoomed, a double click puts everything back. Arrow keys and
// the buttons go through batches. Pictures are the host's previews; nothing is asked of other routes.
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const NODE = 'ErnieCompareImages'
const MIN_HEIGHT_PX = 320
const MAX_ZOOM = 16

const CSS = `
.ernie-compare { display: flex; flex-direction: column; width: 100%; height: 100%; min-height: 120px; overflow: hidden;
  background: #17181c; color: #e8e8ea; border-radius: 6px; font: 12px/1.4 system-ui, sans-serif; user-select: none; }
.ernie-compare .stage { position: relative; flex: 1; min-height: 0; overflow: hidden; cursor: ew-resize; outline: none;
  touch-action: none; }
.ernie-compare .layer { position: absolute; inset: 0; overflow: hidden; pointer-events: none; }
.ernie-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  transform-origin: 0 0; }
.ernie-compare .zoomed img { image-rendering: pixelated; }
.ernie-compare .divider { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #ffffff;
  box-shadow: 0 0 3px #000000; pointer-events: none; }
.ernie-compare .divider::after { content: ''; position: absolute; top: 50%; left: -9px; width: 20px; height: 20px;
  margin-top: -10px; border-radius: 50%; background: #ffffff; box-shadow: 0 0 3px #000000; }
.ernie-compare .label { position: absolute; top: 6px; max-width: 45%; padding: 1px 6px; border-radius: 4px;
  background: #101014cc; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; pointer-events: none; }
.ernie-compare .label.a { left: 6px; }
.ernie-compare .label.b { right: 6px; }
.ernie-compare footer { display: flex; align-items: center; justify-content: center; gap: 8px; padding: 3px; }
.ernie-compare button { background: #2a2c33; color: inherit; border: 1px solid #3d4049; border-radius: 4px;
  padding: 0 8px; font: inherit; cursor: pointer; }
.ernie-compare button:disabled { opacity: .4; cursor: default; }
.ernie-compare:not([data-count]) .stage > * { display: none; }
`

function make (tag, className, parent) {
  const element = document.createElement(tag)
  element.className = className
  parent.append(element)
  return element
}

function address ({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

function makeViewer () {
  const root = document.createElement('div')
  root.className = 'ernie-compare'
  const stage = make('div', 'stage', root)
  stage.tabIndex = 0
  stage.dataset.captureWheel = 'true' // the Vue renderer leaves the wheel to an element that says so and has the focus
  const layers = ['b', 'a'].map((side) => make('div', `layer ${side}`, stage)) // a lies above b
  const images = layers.map((layer) => make('img', '', layer))
  for (const image of images) image.draggable = false
  const [imageB, imageA] = images
  const divider = make('div', 'divider', stage)
  const labelA = make('div', 'label a', stage)
  const labelB = make('div', 'label b', stage)
  const footer = make('footer', '', root)
  const back = make('button', 'back', footer)
  const where = make('span', 'where', footer)
  const next = make('button', 'next', footer)
  back.textContent = '\u2039'
  next.textContent = '\u203a'

  const state = { a: [], b: [], index: 0, split: 0.5, zoom: 1, x: 0, y: 0 } // x, y: what is moved, as part of the stage
  const count = () => Math.max(state.a.length, state.b.length)

  function draw () {
    layers[1].style.clipPath = `inset(0 ${100 * (1 - state.split)}% 0 0)`
    divider.style.left = `${100 * state.split}%`
    for (const image of images) {
      image.style.transform = `translate(${100 * state.x}%, ${100 * state.y}%) scale(${state.zoom})`
    }
    stage.classList.toggle('zoomed', state.zoom > 1)
    where.textContent = `${state.index + 1} / ${count()}` +
      (state.zoom > 1 ? ` \u00b7 ${Math.round(100 * state.zoom)} %` : '')
    back.disabled = state.index === 0
    next.disabled = state.index + 1 >= count()
    Object.assign(root.dataset, { index: state.index, count: count(), split: state.split.toFixed(4) })
    root.dataset.zoom = state.zoom.toFixed(4)
  }

  function show (index) {
    state.index = Math.max(0, Math.min(count() - 1, index))
    for (const [image, list] of [[imageA, state.a], [imageB, state.b]]) {
      image.src = address(list[Math.min(state.index, list.length - 1)]) // a shorter batch stays at its last picture
    }
    draw()
  }

  function place (event) {
    const box = stage.getBoundingClientRect()
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
  }

  function keepInside () {
    for (const axis of ['x', 'y']) state[axis] = Math.min(0, Math.max(1 - state.zoom, state[axis]))
  }

  let drag = null
  stage.addEventListener('pointerdown', (event) => {
    if (!count()) return
    event.stopPropagation() // the graph would move the node
    event.preventDefault()
    stage.focus({ preventScroll: true })
    stage.setPointerCapture(event.pointerId)
    const [x, y] = place(event)
    drag = event.shiftKey || event.button === 1 ? { x: x - state.x, y: y - state.y } : {}
    if (drag.x === undefined) state.split = Math.max(0, Math.min(1, x))
    draw()
  })
  stage.addEventListener('pointermove', (event) => {
    if (!drag) return
    event.stopPropagation()
    const [x, y] = place(event)
    if (drag.x === undefined) state.split = Math.max(0, Math.min(1, x))
    else Object.assign(state, { x: x - drag.x, y: y - drag.y })
    keepInside()
    draw()
  })
  for (const name of ['pointerup', 'pointercancel', 'lostpointercapture']) {
    stage.addEventListener(name, () => { drag = null })
  }
  stage.addEventListener('wheel', (event) => {
    if (!count()) return
    event.stopPropagation()
    event.preventDefault()
    const [x, y] = place(event)
    const zoom = Math.max(1, Math.min(MAX_ZOOM, state.zoom * Math.exp(-event.deltaY / 400)))
    state.x = x - (x - state.x) * zoom / state.zoom // what is under the pointer stays there
    state.y = y - (y - state.y) * zoom / state.zoom
    state.zoom = zoom
    keepInside()
    draw()
  }, { passive: false })
  stage.addEventListener('dblclick', (event) => {
    event.stopPropagation()
    Object.assign(state, { split: 0.5, zoom: 1, x: 0, y: 0 })
    draw()
  })
  stage.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!step || !count()) return
    event.stopPropagation()
    event.preventDefault()
    show(state.index + step)
  })
  back.addEventListener('click', () => show(state.index - 1))
  next.addEventListener('click', () => show(state.index + 1))

  function load ({ a, b, label_a: left, label_b: right }) {
    Object.assign(state, { a, b })
    labelA.textContent = left
    labelB.textContent = right
    for (const [label, text] of [[labelA, left], [labelB, right]]) label.style.visibility = text ? '' : 'hidden'
    show(state.index)
  }
  return { root, load }
}

app.registerExtension({
  name: 'Ernie.Compare',
  setup () {
    make('style', '', document.head).textContent = CSS
  },
  beforeRegisterNodeDef (nodeType, nodeData) {
    if (nodeData.name !== NODE) return
    const created = nodeType.prototype.onNodeCreated
    nodeType.prototype.onNodeCreated = function (...args) {
      created?.apply(this, args)
      const viewer = makeViewer()
      this.ernieViewer = viewer
      this.addDOMWidget('compare', 'ernie_compare', viewer.root, {
        serialize: false, hideOnZoom: false, getValue: () => '', setValue: () => {}, getMinHeight: () => MIN_HEIGHT_PX
      })
      this.setSize?.([Math.max(this.size[0], 420), Math.max(this.size[1], MIN_HEIGHT_PX + 160)])
    }
    const executed = nodeType.prototype.onExecuted
    nodeType.prototype.onExecuted = function (output, ...args) {
      executed?.call(this, output, ...args)
      const shown = output?.ernie_compare?.[0]
      if (shown) this.ernieViewer.load(shown)
    }
  }
})
