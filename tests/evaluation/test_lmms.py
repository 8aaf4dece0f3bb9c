"""The paper's ten tasks through lmms-eval on local data. Skipped where lmms-eval is not installed."""

import dataclasses
import json
import os
import shutil

import pytest

pytest.importorskip("lmms_eval")
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

from deltallava_jax.data import tokens  # noqa: E402
from deltallava_jax.errors import ConfigError
from deltallava_jax.evaluation import answers, lmms  # noqa: E402
from deltallava_jax.evaluation.tasks import CAPTIONS, DATA, write_offline  # noqa: E402
from deltallava_jax.inference.model import Model  # noqa: E402
from tests import tiny  # noqa: E402
from tests.evaluation import local_tasks  # noqa: E402
from tests.tiny import random_params  # noqa: E402

JAVA = shutil.which("java") and not os.environ.get("NO_CAPTIONS")
TASKS = [task for task in DATA if task not in CAPTIONS or JAVA]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return folder, local_tasks.save(TASKS, folder)


@pytest.fixture(scope="module")
def model():
    cfg = tiny.get_config().model
    cfg = dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, scale_factor=(2, 4)))
    return Model(cfg, random_params(cfg), tokens.train(["What color is it?", "yes no red"], 380), "brief")


class Recorder(lmms.lmms):
    """lmms-eval's view of a model that knows the answers beforehand."""

    def __init__(self, known):
        super().__init__()
        self.known, self.batch_size, self.asked = known, 4, []

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.known[request.args[4]][request.args[3]] for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


def lmms_evals_own(folder, known, tmp_path):
    """Scores of lmms-eval alone: its tasks on local data by the few lines that its documentation gives."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.tasks import __file__ as official

    for task in TASKS:
        text = f"include: {os.path.dirname(official)}/{DATA[task][0]}\ntask: own_{task}\n"
        text += f"dataset_path: {folder / task}\n"
        text += "dataset_name: null\ndataset_kwargs: {load_from_disk: true}\nprocess_docs: null\n"
        (tmp_path / f"own_{task}.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    recorder = Recorder({f"own_{task}": said for task, said in known.items()})
    os.chdir(tmp_path)  # scorers write their files where they are
    found = simple_evaluate(recorder, tasks=list(recorder.known), task_manager=manager, bootstrap_iters=0)
    return {task: found["results"][f"own_{task}"] for task in TASKS}


def test_a_model_that_knows_the_answers_gets_lmms_evals_own_scores(local, model, tmp_path, monkeypatch):
    folder, known = local
    monkeypatch.chdir(tmp_path)
    ours = lmms.DeltaLlava(model, answers=tmp_path / "kept", budget=4)
    monkeypatch.setattr(ours, "_answer", None)  # nothing is left to answer
    monkeypatch.setattr(ours, "_key", lambda request: f"{request.args[4]}/{request.args[3]}")
    ours._saved.add({f"{task}/{number}": said for task in TASKS for number, said in enumerate(known[task])})
    found = lmms.evaluate(ours, TASKS, tmp_path / "out", offline=folder)
    own = lmms_evals_own(folder, known, tmp_path)
    for task in TASKS:
        for metric, value in found[task]["metrics"].items():
            rules = [rule for name, rule in own[task].items() if name.split(",")[0] == metric]
            assert [value] == rules, (task, metric)
        assert found[task]["n"] == len(known[task])
    score = lambda task, metric: found[task]["metrics"][metric]
    assert score("gqa", "exact_match") == pytest.approx(4 / 6)  # "Red." is right, "the black" is not
    assert score("pope", "pope_accuracy") == pytest.approx(4 / 6)  # "Yes." is no yes
    assert score("mmbench_en_dev", "gpt_eval_score") == pytest.approx(200 / 3)  # all turns of a question must be right
    assert score("mme", "mme_perception_score") == pytest.approx(200 + 50 + 200)
    assert score("scienceqa_img", "exact_match") == 1.0
    if "nocaps_val" in found:
        assert score("nocaps_val", "nocaps_CIDEr") > 0 and score("flickr30k_test", "flickr_CIDEr") > 0


def test_all_tasks_run_with_our_model_and_a_killed_evaluation_resumes(local, model, tmp_path, monkeypatch):
    folder, _ = local
    monkeypatch.setattr(lmms, "_token_limit", lambda request: min(request.args[1].get("max_new_tokens", 12), 12))
    whole = lmms.DeltaLlava(model, budget=16, batch_size=3, answers=tmp_path / "kept")
    found = lmms.evaluate(whole, TASKS, tmp_path / "out", offline=folder)
    assert set(found) == set(TASKS) and all(report["metrics"] for report in found.values())
    kept = answers.SavedAnswers(tmp_path / "kept").read()

    file = tmp_path / "kept" / "0.jsonl"  # as a kill leaves it: half of the answers, the last one cut short
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:20])
    again, asked = lmms.DeltaLlava(model, budget=16, batch_size=5, answers=tmp_path / "kept"), []
    answer = again._answer
    monkeypatch.setattr(again, "_answer", lambda questions, most: asked.extend(questions) or answer(questions, most))
    assert lmms.evaluate(again, TASKS, tmp_path / "out", offline=folder) == found
    assert len(asked) == len(lines) - len(lines) // 2
    assert answers.SavedAnswers(tmp_path / "kept").read() == kept

    other = lmms.DeltaLlava(model, budget=4, answers=tmp_path / "kept")  # another budget is another question
    monkeypatch.setattr(other, "_answer", answers.Answerer(model, budget=4))
    before = len(kept)
    lmms.evaluate(other, ["gqa"], tmp_path / "out", offline=folder)
    assert len(answers.SavedAnswers(tmp_path / "kept").read()) == before + 6


def test_the_prompts_are_the_official_ones(local, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    folder, known = local
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=str(write_offline(TASKS, folder, tmp_path)), include_defaults=False)
    recorder = Recorder(known)
    simple_evaluate(recorder, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
    first = {}
    for context, options, _, _, task, _ in recorder.asked:
        first.setdefault(task, (context, options.get("max_new_tokens")))
    word = "\nAnswer the question using a single word or phrase."
    assert first["gqa"] == (f"What color is thing 0?{word}", 16)
    assert first["pope"] == (f"Is there a cat 0?{word}", 128)
    assert first["mme"] == (f"Is this existence?{word}", 16)
    assert first["vqav2_val"] == (f"how many 0?{word}", 16)
    assert first["textvqa_val"][0] == f"How many 0?{word}"  # without OCR tokens
    unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert first["vizwiz_vqa_val"][0] == f"How many 0?{unsure}{word}"
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert first["scienceqa_img"] == (f"Which 0?\nA. water\nB. copper\nC. oxygen{letter}", 16)
    assert first["mmbench_en_dev"][0].endswith(letter)


def test_what_no_spreadsheet_holds_is_left_out(model, monkeypatch):
    class Request:
        args = ("what?", {}, lambda document: [], 0, "mme", "test")

    ours = lmms.DeltaLlava(model)
    ours.task_dict = {"mme": {"test": [{}]}}
    monkeypatch.setattr(ours, "_answer", lambda questions, most: ["re\x00d\x1b \n\t two\ufffe"])
    assert ours.generate_until([Request()]) == ["red \n\t two\ufffe"]  # MMBench's scorer writes a sheet


def test_what_is_missing_is_named(local, tmp_path):
    with pytest.raises(ConfigError, match="expected .*mme to be a DatasetDict with the split 'test'"):
        write_offline(["mme"], tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'mmmu'"):
        write_offline(["mmmu"], tmp_path, tmp_path)


def test_a_picture_that_cannot_be_read_is_an_empty_answer_counted_and_listed(model, tmp_path, capsys):
    import datasets
    from PIL import Image

    pictures = [Image.new("RGB", (40, 40), "red"), Image.new("RGB", (2, 400)), Image.new("RGB", (40, 40), "blue")]
    rows = [row | dict(image=image) for (row, _), image in zip(local_tasks._rows("pope"), pictures)]  # noqa: B905
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / "pope"))
    for _ in range(2):  # and again, where the other answers are kept
        ours = lmms.DeltaLlava(model, budget=4, answers=tmp_path / "kept")
        found = lmms.evaluate(ours, ["pope"], tmp_path / "out", offline=tmp_path)["pope"]
        assert found["n"] == 3 and list(found["unread"]) == ["pope/test/1"]
        err = capsys.readouterr().err
        assert "1 answers are empty" in err and "pope/test/1: image of mode RGB: 2 x 400 pixels" in err
    assert len(answers.SavedAnswers(tmp_path / "kept").read()) == 2


def test_the_entry_points_manifest_names_our_class():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms.manifest())
    assert registry.get_model_class("deltallava_jax") is lmms.DeltaLlava


def test_a_kept_answer_belongs_to_its_data_and_prompt(local, model):
    class Request:
        def __init__(self, context, most=16):
            self.args = (context, {"max_new_tokens": most}, None, 3, "gqa", "testdev")

    class Data:
        def __init__(self, fingerprint):
            self._fingerprint = fingerprint

    ours = lmms.DeltaLlava(model, budget=4)
    ours.task_dict = {"gqa": {"testdev": Data("one")}}
    keys = {ours._key(Request("a")), ours._key(Request("b")), ours._key(Request("a", 64))}
    ours.task_dict = {"gqa": {"testdev": Data("two")}}
    assert len(keys | {ours._key(Request("a"))}) == 4
    assert json.dumps(sorted(keys))
