"""GenEval's rules on detections with a known answer, and its averages."""

import json
import math

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.geneval import (
    PUBLISHED,
    TASKS,
    Detection,
    ObjectPrompt,
    ObjectResult,
    Wanted,
    holds_results,
    judge,
    read_detections,
    read_object_prompts,
    read_results,
    relative_position,
    score_geneval,
    summarise,
)


def seen(name, score=0.95, box=(0, 0, 10, 10), colour=None):
    return Detection(name=name, score=score, box=box, colour=colour)


def wants(task, *include, exclude=()):
    return ObjectPrompt(index=0, task=task, prompt="a photo", include=include, exclude=tuple(exclude))


CUP, CAR = Wanted(name="cup", count=1), Wanted(name="car", count=1)
THREE_CUPS = wants("counting", Wanted(name="cup", count=3), exclude=[Wanted(name="cup", count=4)])
RED_CUP = wants("colors", Wanted(name="cup", count=1, colour="red"))
CAR_LEFT = wants("position", CUP, Wanted(name="car", count=1, position=("left of", 0)))
LEFT, RIGHT = (0, 0, 10, 10), (50, 0, 60, 10)


@pytest.mark.parametrize(
    ("prompt", "detections", "correct", "reason"),
    [
        (wants("single_object", CUP), [seen("cup", 0.31)], True, ""),
        (wants("single_object", CUP), [seen("cup", 0.3)], False, "expected 1 cup, found 0"),  # strictly above
        (wants("single_object", CUP), [seen("cup"), seen("cup"), seen("car")], True, ""),  # more is no fault
        (wants("two_object", CUP, CAR), [seen("cup")], False, "expected 1 car, found 0"),
        (wants("two_object", CUP, CAR), [seen("car"), seen("cup")], True, ""),
        (THREE_CUPS, [seen("cup")] * 3, True, ""),
        (THREE_CUPS, [seen("cup")] * 4, False, "expected fewer than 4 cup, found 4"),
        (THREE_CUPS, [seen("cup")] * 3 + [seen("cup", 0.9)], True, ""),  # counting asks for more than 0.9
        (THREE_CUPS, [seen("cup")] * 2 + [seen("cup", 0.89)], False, "expected 3 cup, found 2"),
        (RED_CUP, [seen("cup", colour="red")], True, ""),
        (RED_CUP, [seen("cup", 0.9, colour="blue"), seen("cup", 0.8, colour="red")], False, "found blue"),
        (RED_CUP, [seen("cup", 0.8, colour="blue"), seen("cup", 0.9, colour="red")], True, ""),  # the surest is asked
        (CAR_LEFT, [seen("car", box=LEFT), seen("cup", box=RIGHT)], True, ""),
        (CAR_LEFT, [seen("car", box=RIGHT), seen("cup", box=LEFT)], False, "it is right of"),
        (CAR_LEFT, [seen("car", box=LEFT), seen("cup", box=LEFT)], False, "too close"),
        (CAR_LEFT, [seen("car", box=LEFT)], False, "nothing there for car to be left of"),
        (wants("single_object", Wanted(name="computer mouse", count=1)), [seen("mouse")], True, ""),  # COCO's name
    ],
    ids=str,
)
def test_the_rules(prompt, detections, correct, reason):
    found, said = judge(prompt, detections)
    assert found is correct
    assert reason in said


def test_at_most_16_of_a_class_count():
    many = wants("counting", Wanted(name="cup", count=16), exclude=[Wanted(name="cup", count=17)])
    assert judge(many, [seen("cup")] * 40)[0]


def test_a_wrong_colour_leaves_nothing_to_be_placed_against():
    prompt = wants(
        "position", Wanted(name="cup", count=1, colour="red"), Wanted(name="car", count=1, position=("left of", 0))
    )
    _, reason = judge(prompt, [seen("cup", box=RIGHT, colour="blue"), seen("car", box=LEFT)])
    assert "found blue" in reason
    assert "nothing there" in reason


def test_a_colour_that_nobody_looked_for_is_an_error():
    with pytest.raises(ErnieError, match="the colour of cup is asked for"):
        judge(RED_CUP, [seen("cup")])


@pytest.mark.parametrize(
    ("box", "sides"),
    [
        ((-50, 0, -40, 10), {"left of"}),
        ((50, 0, 60, 10), {"right of"}),
        ((0, -50, 10, -40), {"above"}),  # y grows downwards
        ((0, 50, 10, 60), {"below"}),
        ((40, 40, 50, 50), {"right of", "below"}),
        ((1, 0, 11, 10), set()),  # within 0.1 of both sizes
        ((2.1, 0, 12.1, 10), set()),  # beyond it by too small a part of the offset
        ((5, 0, 15, 10), {"right of"}),  # (5 - 0.1 * 20) / 5 = 0.6
        ((4.1, 0, 14.1, 10), {"right of"}),  # (4.1 - 2) / 4.1 = 0.51
        ((3.9, 0, 13.9, 10), set()),  # (3.9 - 2) / 3.9 = 0.49
        ((0, 0, 10, 10), set()),
    ],
    ids=lambda value: "-".join(map(str, sorted(value))),
)
def test_where_an_object_lies(box, sides):
    assert relative_position(box, (0, 0, 10, 10)) == sides


def test_the_other_object_lies_on_the_opposite_side():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    boxes = [(0, 0, 10, 10), (30, 5, 50, 9), (12, -40, 90, -20), (3, 3, 6, 6)]
    for a in boxes:
        for b in boxes:
            assert {opposite[s] for s in relative_position(a, b)} == relative_position(b, a)


def outcomes(**right_of_total):
    """Per task (right, total): as many pictures, each of a prompt of its own."""
    return [
        ObjectResult(image=f"{task}/{i}", task=task, prompt=f"{task} {i}", correct=i < right)
        for task, (right, total) in right_of_total.items()
        for i in range(total)
    ]


FULL = {"single_object": (4, 4), "two_object": (1, 2), "counting": (0, 3), "colors": (1, 1), "position": (1, 4)}


def test_overall_is_the_mean_of_the_tasks_not_of_the_pictures():
    found = summarise(outcomes(**FULL, color_attr=(0, 100)))
    assert found.overall.value == pytest.approx((1 + 0.5 + 0 + 1 + 0.25 + 0) / 6)
    assert found.correct_images == pytest.approx(7 / 114)
    assert [(task, n) for task, n, _ in found.tasks] == [
        *(("single_object", 4), ("two_object", 2), ("counting", 3)),
        *(("colors", 1), ("position", 4), ("color_attr", 100)),
    ]
    assert found.overall.low < found.overall.value < found.overall.high


def test_without_all_six_tasks_there_is_no_overall_and_it_is_said():
    found = summarise(outcomes(**FULL))
    assert math.isnan(found.overall.value)
    assert "no pictures of color_attr" in str(found.problems[0])


def test_a_prompt_is_right_when_one_of_its_pictures_is():
    results = [ObjectResult(image=str(i), task="colors", prompt="p", correct=i == 2) for i in range(4)]
    found = summarise(results)
    assert (found.num_prompts, found.correct_prompts, found.correct_images) == (1, 1.0, 0.25)


def test_a_picture_counts_once_and_a_foreign_task_stays_out_of_the_overall():
    results = [*outcomes(**FULL, color_attr=(1, 1)), *outcomes(colors=(0, 1), spelling=(0, 1))]
    found = summarise(results)
    assert found.overall.value == summarise(outcomes(**FULL, color_attr=(1, 1))).overall.value
    text = "\n".join(map(str, found.problems))
    assert "colors/0: left out: it was judged before" in text
    assert "spelling: not one of GenEval's six" in text


def test_the_published_columns_are_means_of_their_tasks():
    for columns in PUBLISHED.values():
        for overall, *tasks in columns.values():
            assert len(tasks) == len(TASKS)
            assert overall == pytest.approx(sum(tasks) / 6, abs=1.1e-4)


# --- files -----------------------------------------------------------------------------------------------------

METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "pizza", "count": 3}],
        "exclude": [{"class": "pizza", "count": 4}],
        "prompt": "a photo of three pizzas",
    },
    {
        "tag": "position",
        "include": [{"class": "couch", "count": 1}, {"class": "bird", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bird left of a couch",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "sink", "count": 1, "color": "black"}, {"class": "cake", "count": 1, "color": "pink"}],
        "prompt": "a photo of a black sink and a pink cake",
    },
]


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_published_prompts_file_is_read(tmp_path):
    prompts = read_object_prompts(write_lines(tmp_path / "evaluation_metadata.jsonl", METADATA))
    assert [p.index for p in prompts] == [0, 1, 2, 3]
    assert prompts[1].exclude == (Wanted(name="pizza", count=4),)
    assert prompts[2].include[1] == Wanted(name="bird", count=1, position=("left of", 0))
    assert prompts[3].include[0].colour == "black"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "include": []},
        {"tag": "colors", "prompt": "p", "include": [{"count": 1}]},
        {"tag": "colors", "prompt": "p", "include": [{"class": "cup", "count": 1, "color": "mauve"}]},
        {"tag": "position", "prompt": "p", "include": [{"class": "cup", "count": 1, "position": ["beside", 0]}]},
    ],
    ids=str,
)
def test_other_lines_are_no_prompts(tmp_path, row):
    with pytest.raises(ErnieError, match="row 1 is no prompt of GenEval"):
        read_object_prompts(write_lines(tmp_path / "a.jsonl", [row]))


def test_detections_are_read_and_judged_from_file_to_score(tmp_path):
    prompts = read_object_prompts(write_lines(tmp_path / "m.jsonl", METADATA))

    def d(name, box=LEFT, **more):
        return {"class": name, "score": 0.97, "box": list(box), **more}

    rows = [
        {"filename": "00000/samples/0000.png", "detections": [d("bench")]},
        {"filename": "out/00001/samples/0000.png", "details": json.dumps({"pizza": [[*LEFT, 0.99]] * 3})},
        {"image": "x.png", "prompt_index": 2, "detections": [d("bird"), d("couch", RIGHT)]},
        {
            "image": "y.png",
            "prompt": METADATA[3]["prompt"],
            "detections": [d("sink", color="black"), d("cake", color="red")],
        },
    ]
    pictures, problems = read_detections(write_lines(tmp_path / "d.jsonl", rows), prompts)
    assert not problems
    found = score_geneval(prompts, pictures)
    assert [(r.task, r.correct) for r in found.results] == [
        *(("single_object", True), ("counting", True), ("position", True), ("color_attr", False)),
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"image": "00000/a.png"}, "neither detections nor details"),
        ({"image": "cat.png", "detections": []}, "belongs to no prompt"),
        ({"image": "00000/a.png", "detections": [{"class": "bench", "box": [0, 0, 1, 1]}]}, "another shape"),
        ({"image": "00000/a.png", "detections": [{"class": "bench", "score": 1, "box": [0, 1]}]}, "another shape"),
        ({"image": "00000/a.png", "detections": [{"class": "bench", "score": 97, "box": [0, 0, 1, 1]}]}, "score 97"),
        ({"image": "00000/a.png", "details": "{"}, "another shape"),
        (
            {"image": "00000/a.png", "detections": [{"class": "b", "score": 1, "box": [0, 0, 1, 1], "color": "mauve"}]},
            "the colour 'mauve'",
        ),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used_are_listed(tmp_path, row, text):
    prompts = read_object_prompts(write_lines(tmp_path / "m.jsonl", METADATA))
    good = {"image": "00000/b.png", "detections": []}
    pictures, problems = read_detections(write_lines(tmp_path / "d.jsonl", [row, good]), prompts)
    assert len(pictures) == 1
    assert text in str(problems[0])
    with pytest.raises(ErnieError, match="no detections that could be used"):
        read_detections(write_lines(tmp_path / "e.jsonl", [row]), prompts)


def test_pictures_of_unknown_prompts_and_uncoloured_ones_are_listed(tmp_path):
    prompts = read_object_prompts(write_lines(tmp_path / "m.jsonl", METADATA))
    sink = [seen("sink"), seen("cake")]
    found = score_geneval(prompts, [("a", 0, [seen("bench")]), ("b", 9, []), ("c", 3, sink)])
    text = "\n".join(map(str, found.problems))
    assert "b: left out: there is no prompt 9" in text
    assert "c: left out: the colour of sink is asked for" in text
    assert "3 of 4 have no picture" in text


def test_judged_pictures_are_read_as_the_published_evaluation_writes_them(tmp_path):
    rows = [
        {"filename": "00000/0.png", "tag": "colors", "prompt": "p", "correct": True, "reason": "", "metadata": "{}"},
        {"filename": "00000/1.png", "tag": "colors", "prompt": "p", "correct": False, "reason": "no", "metadata": "{}"},
        {"filename": "00000/2.png", "tag": "colors"},
    ]
    path = write_lines(tmp_path / "results.jsonl", rows)
    assert holds_results(path)
    results, problems = read_results(path)
    assert [r.correct for r in results] == [True, False]
    assert "row 3: left out: it has no tag, prompt and correct" in str(problems[0])
    assert not holds_results(write_lines(tmp_path / "d.jsonl", [{"image": "a", "detections": []}]))
