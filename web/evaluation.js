// Judging a prompt set: does a picture pass, or which of two settings is better, for alignment and for fidelity. Which
// setting a picture is of is never sent here. Routes: nodes/judging.py. Texts: ernieEvaluation.
import { registerPanel } from './panel.js'

const CRITERIA = ['alignment', 'fidelity']
const OF_ONE = { ArrowRight: 'pass', 1: 'pass', p: 'pass', ArrowLeft: 'fail', 2: 'fail', f: 'fail' }
const OF_TWO = {
  ArrowLeft: 'left', 1: 'left', ArrowRight: 'right', 2: 'right', ArrowDown: 'tie', ' ': 'tie', 0: 'tie'
}

registerPanel({
  name: 'ernieEvaluation',
  id: 'ernie-evaluation',
  extension: 'ernie.evaluation',
  node: 'ErnieJudgeByPeople',
  command: 'Ernie.Evaluation.Open',
  label: 'Open evaluation (ERNIE)',
  icon: 'pi pi-check-square',
  route: '/ernie/evaluations',
  session: 'evaluation',
  sessions: 'evaluations',
  told: 'ernie_evaluation',
  widget: 'open_evaluation',
  readsPrompt: true,
  keys: (question) => question.pictures.length > 1 ? OF_TWO : OF_ONE,
  answers: (question) => question.pictures.length > 1
    ? [['left', '\u2190'], ['tie', '\u2193'], ['right', '\u2192']]
    : [['fail', '\u2190'], ['pass', '\u2192']],
  pictures: (question) => question.pictures.length > 1
    ? [['left', question.pictures[0]], ['right', question.pictures[1]]]
    : [['picture', question.pictures[0]]],
  ask: (_, question, say) => ({
    text: say(question.criterion + (question.pictures.length > 1 ? 'OfTwo' : 'OfOne')),
    hue: CRITERIA.indexOf(question.criterion)
  }),
  place: (t, say) => [say(t.mode === 'side by side' ? 'sideBySide' : 'passOrFail')]
})
