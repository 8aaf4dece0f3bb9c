"""Answers by batches against single ones, answers saved over a kill, and the table with the paper's rows."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.data import tokens
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.evaluation import answers, benchmarks, table, tasks
from deltallava_jax.inference.model import Model
from tests import tiny

READ = "expected at most 89,478,485 in all, 32,768 per side and an aspect ratio of 100"


@pytest.fixture(scope="module")
def model():
    cfg = tiny.get_config().model
    cfg = dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, scale_factor=(2, 4)))
    return Model(cfg, tiny.random_params(cfg), tokens.train(["what color is it?", "yes no red"], 380), "brief")


def test_answers_of_a_batch_are_those_of_single_questions(model):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3)).astype(np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    texts = ["what color is it?", "what?", "is it red or no color?", "yes"]
    questions = [([picture], text) for picture, text in zip(pictures, texts, strict=True)]
    questions += [([], "no red"), ([pictures[0]], "<image>\nwhat?")]
    found = answers.Answerer(model, budget=4, rows=3)(questions, 5)
    single = [model.generate(list(shown), text, budget=4, max_new_tokens=5) for shown, text in questions]
    assert found == single and len(set(found)) > 3
    assert answers.Answerer(model, rows=1).budget == 16
    with pytest.raises(ConfigError, match="16, 4 tokens"):
        answers.Answerer(model, budget=9)
    with pytest.raises(ConfigError, match="no tokenizer"):
        answers.Answerer(dataclasses.replace(model, tokenizer=None))


def test_an_image_that_cannot_be_read_takes_its_own_answer_alone(model):
    """Of 2 x 400 pixels: one side is more than a hundred times the other."""
    sound, thin = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (2, 400))
    ask = answers.Answerer(model, budget=4, rows=8)
    questions = [([sound], "what?"), ([thin], "what?"), ([], "no red"), ([sound, thin], "yes")]
    found = ask(questions, 4)
    assert [str(found[place]) for place in (1, 3)] == ["image of mode RGB: 2 x 400 pixels; " + READ] * 2
    assert [found[0], found[2]] == ask([questions[0], questions[2]], 4)
    assert all(isinstance(found[place], BadSample) for place in (1, 3)) and ask([], 4) == []


@pytest.mark.parametrize("rows", ["auto", "auto:4", "16", 16])
def test_the_batch_size_is_read_as_lmms_eval_writes_it(model, rows):
    assert answers.Answerer(model, rows=rows).rows == 16


@pytest.mark.parametrize("rows", ["many", "0", -2, "1.5"])
def test_another_batch_size_is_one_line(model, rows):
    with pytest.raises(ConfigError, match=f"batch_size={rows}; expected a number of questions"):
        answers.Answerer(model, rows=rows)


def test_answers_survive_a_kill(tmp_path):
    first, second = answers.SavedAnswers(tmp_path / "a", 0), answers.SavedAnswers(tmp_path / "a", 1)
    assert first.read() == {}
    first.add({"one": "yes\nno", "two": "é"})
    second.add({"three": "3"})
    file = tmp_path / "a" / "0.jsonl"
    file.write_text(file.read_text() + '{"key": "four", "ans')  # truncated
    assert first.read() == {"one": "yes\nno", "two": "é", "three": "3"}
    first.add({"four": "4"})
    assert second.read() == {"one": "yes\nno", "two": "é", "three": "3", "four": "4"}
    nothing = answers.SavedAnswers(None)
    nothing.add({"one": "1"})
    assert nothing.read() == {}


def report(folder, task, budget, limit=0, **metrics):
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(task=task, budget=budget, limit=limit, metrics=metrics))
    for name in (task, f"{task}_{budget}"):
        (folder / "eval" / f"{name}.json").write_text(text)


def test_the_table_has_our_rows_and_the_papers_marked(tmp_path):
    report(tmp_path / "mine", "gqa", 36, exact_match=0.6149)
    report(tmp_path / "mine", "pope", 36, pope_f1_score=0.5, pope_accuracy=0.9)
    report(tmp_path / "mine", "gqa", 144, limit=8, exact_match=0.25)
    report(tmp_path / "other", "mme", 1, mme_perception_score=1234.56)
    (tmp_path / "mine" / "eval" / "easy_vqa_16.json").write_text(json.dumps(dict(task="easy_vqa", budget=16)))
    lines = table.format_table([tmp_path / "mine", tmp_path / "other"]).split("\n")
    assert lines[0] == "| Method | Tokens | GQA | MME | POPE |"
    assert lines[2] == "| mine | 36 | 61.5 |  | 50.0 |"  # a part of the questions is no result
    assert lines[3] == "| other | 1 |  | 1234.6 |  |"
    assert "| Delta-LLaVA (paper) | 144 | 62.34 | 1466.52 | 86.77 |" in lines
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert all("(paper)" in line for line in rows[2:]) and len(rows) == 2 + len(table.PAPER)
    assert "mix protocols" in lines[-5] + lines[-4]


def test_the_papers_rows_have_a_value_a_column_at_most():
    assert all(len(values) <= len(table.COLUMNS) for _, _, values in table.PAPER)
    assert {task for task, _, _ in table.COLUMNS.values()} == set(tasks.DATA)


def test_a_result_records_versions_and_commit():
    found = benchmarks.versions()
    assert found["jax"].startswith("0.") and "python" in found
    commit = benchmarks.commit()
    assert commit is None or len(commit.rstrip("+")) == 40


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'gqa' needs lmms-eval; requirements-eval.txt"):
        tasks.require_installed(["gqa"])
    with pytest.raises(ConfigError, match="unknown task 'gqua'; known: easy_vqa, gqa"):
        tasks.require_installed(["gqua"])
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="java"):
        tasks.require_installed(["gqa", "nocaps_val"])
    tasks.require_installed(["gqa", "pope"])


def test_a_local_copy_is_a_dataset_dict_with_the_tasks_split(tmp_path):
    def message():
        with pytest.raises(ConfigError) as caught:
            tasks.local_copy("pope", tmp_path)
        assert "\n" not in str(caught.value) and "save_to_disk(" in str(caught.value)
        return str(caught.value)

    copy = tmp_path / "pope"
    assert f"expected {copy} to be a DatasetDict with the split 'test', but it does not exist" in message()
    (copy / "test").mkdir(parents=True)
    assert "nothing is saved there" in message()
    (copy / "test" / "dataset_info.json").write_text("{}")  # as Dataset.save_to_disk(DIR/TASK/SPLIT) leaves it
    assert "it holds a Dataset;" in message()
    (copy / "dataset_dict.json").write_text(json.dumps(dict(splits=["train"])))
    assert "it has the splits train;" in message()
    (copy / "dataset_dict.json").write_text(json.dumps(dict(splits=["test"])))
    assert tasks.local_copy("pope", tmp_path) == copy
    with pytest.raises(ConfigError, match="unknown task 'mmmu'"):
        tasks.local_copy("mmmu", tmp_path)


def test_data_that_cannot_be_fetched_is_one_line_that_names_the_login():
    class RetryError(Exception):  # tenacity's, which lmms-eval raises
        class last_attempt:
            exception = staticmethod(lambda: DatasetNotFoundError("Dataset 'a/b' is a gated dataset.\nMore."))

    DatasetNotFoundError = type("DatasetNotFoundError", (Exception,), {"__module__": "datasets.exceptions"})
    for error in (RetryError("<Future at 0x7f>"), RetryError.last_attempt.exception()):
        line = tasks.fetch_error(error)
        assert line.startswith("DatasetNotFoundError: Dataset 'a/b' is a gated dataset. Some") and "\n" not in line
        assert "hf auth login" in line and "--offline" in line
    RetryError.last_attempt.exception = staticmethod(lambda: KeyError("of a scorer"))
    assert tasks.fetch_error(RetryError()) is tasks.fetch_error(KeyError("mine")) is None


def test_mmbench_is_scored_without_gpt_where_there_is_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert tasks.official_name("mmbench_en_dev", offline=False) == "mmbench_en_dev_static"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert tasks.official_name("mmbench_en_dev", offline=False) == "mmbench_en_dev"
    assert tasks.official_name("mmbench_en_dev", offline=True) == "mmbench_en_dev"
