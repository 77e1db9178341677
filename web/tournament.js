// The tournament: which of two pictures looks better. Routes: nodes/tournament.py. Texts: ernieTournament.
import { element, registerPanel } from './panel.js'

const KEYS = {
  ArrowLeft: 'left', 1: 'left', ArrowRight: 'right', 2: 'right', ArrowDown: 'tie', ' ': 'tie'
}

registerPanel({
  name: 'ernieTournament',
  id: 'ernie-tournament',
  extension: 'ernie.tournament',
  node: 'ErnieTournament',
  command: 'Ernie.Tournament.Open',
  label: 'Open tournament (ERNIE)',
  icon: 'pi pi-images',
  route: '/ernie/tournaments',
  session: 'tournament',
  sessions: 'tournaments',
  told: 'ernie_tournament',
  widget: 'open_tournament',
  keys: () => KEYS,
  answers: () => [['left', '\u2190'], ['tie', '\u2193'], ['right', '\u2192']],
  pictures: (question) => [['left', question.left], ['right', question.right]],
  ask: (t, _, say) => ({ text: t.question === 'Which one looks better?' ? say('question') : t.question }),
  place: (t, say) => [t.round === 0 ? say('calibration') : say('round', { round: t.round, rounds: t.rounds })],

  async results (t, say, ask, address) {
    const { best } = await ask('/ranking')
    const figures = best.map((one) => element('figure', {},
      element('img', { src: address(one.number, 400), alt: one.label }),
      element('figcaption', { textContent: `${one.place}. ${one.label}` })))
    return [element('h3', { textContent: say('best') }), element('div', { className: 'best' }, ...figures)]
  }
})
