"""Ten small local data sets with the columns of the official ones, and answers to their questions, right and wrong."""

import numpy as np
from PIL import Image

COLORS = ("red", "green", "blue", "black")


def picture(number):
    pixels = np.full((40 + number, 52, 3), 255, np.uint8)
    pixels[8:24, 8:24] = (40 * number % 256, 90, 200)
    return Image.fromarray(pixels)


def _rows(task):
    """[(row without its image, an answer to it)]"""
    if task == "gqa":
        ask = lambda i: dict(id=str(i), imageId=str(i), question=f"What color is thing {i}?", answer=COLORS[i % 4])
        return [(ask(i), said) for i, said in enumerate(["Red.", "blue", "BLUE", "the black", "red", "green"])]
    if task == "mmbench_en_dev":
        rows, options = [], ("west", "triangle", "a wooden table", "nan")
        for index, answers in ((0, ("A", "The answer is B.")), (1, ("B", "triangle")), (2, ("C", "C"))):
            for turn, said in enumerate(answers):
                row = dict(
                    zip("ABCD", options, strict=True),
                    index=index + 10**6 * turn,
                    question=f"Which {index}?",
                    hint="nan",
                )
                row |= {"answer": "ABC"[index], "category": "color", "L2-category": "attribute", "source": "s"}
                rows.append((row | dict(split="dev"), said))
        return rows
    if task == "mme":
        rows = []
        for i, category in enumerate(("existence", "color", "OCR", "code_reasoning")):
            for answer, said in (("Yes", "Yes"), ("No", ("No", "yes", "No, it is not.", "maybe")[i])):
                question = f"Is this {category}? Please answer yes or no."
                rows.append((dict(question_id=f"{i}.png", category=category, question=question, answer=answer), said))
        return rows
    if task == "pope":
        said = ("yes", "No", "Yes.", "no", "YES", "yes")
        ask = lambda i: dict(id=str(i), question_id=str(i), question=f"Is there a cat {i}?", image_source=str(i))
        kinds = ("random", "popular", "adversarial")
        return [(ask(i) | dict(answer=("yes", "no")[i % 2], category=kinds[i % 3]), said[i]) for i in range(6)]
    if task == "scienceqa_img":
        ask = lambda i: dict(question=f"Which {i}?", choices=["water", "copper", "oxygen"], answer=i % 3)
        return [(ask(i) | dict(hint=("", "Read this.")[i % 2]), said) for i, said in enumerate(["A", "b", "C. oxygen"])]
    if task in ("textvqa_val", "vqav2_val", "vizwiz_vqa_val"):
        given = [["two"] * 10, ["a dog"] * 2 + ["cat"] * 8, ["it's 5"] * 5 + ["five"] * 5]
        as_row = lambda words: [dict(answer=w, answer_confidence="yes", answer_id=n) for n, w in enumerate(words)]
        rows = []
        for i, (words, said) in enumerate(zip(given, ("2", "Dog", "5"), strict=True)):
            answers = as_row(words) if task == "vqav2_val" else words
            row = dict(question=f"how many {i}?", answers=answers, question_id=str(i), category="other")
            rows.append((row | dict(ocr_tokens=["STOP"]), said))
        return rows
    said = ("a red square on white", "a square", "")
    ask = lambda i: [f"a {COLORS[i]} square on white paper", f"one {COLORS[i]} square", "a picture of a square"]
    key, number = ("annotations_captions", "image_id") if task == "nocaps_val" else ("caption", "img_id")
    return [({key: ask(i), number: i if task == "nocaps_val" else str(i)}, said[i]) for i in range(3)]


def save(tasks, folder):
    """Writes the data sets below ``folder``; {task: the answers, by document}."""
    import datasets

    from deltallava_jax.evaluation.tasks import DATA

    answers = {}
    for task in tasks:
        rows = _rows(task)
        table = datasets.Dataset.from_list([row | dict(image=picture(i)) for i, (row, _) in enumerate(rows)])
        table = table.cast_column("image", datasets.Image())
        datasets.DatasetDict({DATA[task][1]: table}).save_to_disk(str(folder / task))
        answers[task] = [said for _, said in rows]
    return answers
