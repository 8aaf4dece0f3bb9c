"""Our models in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): the paper's benchmarks, by the official prompts and
scorers. In process from eval.py, and as ``lmms-eval --model deltallava_jax --model_args path=DIR,budget=36``.

As lmms-eval's own LLaVA model does, images go before the text, decoding is greedy and ``until`` is ignored.
lmms-eval is not one of our requirements; requirements-eval.txt explains its installation. Only eval.py and the
``lmms-eval`` command import this module."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from lmms_eval.api.model import lmms
from PIL import Image

from deltallava_jax import cli
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.evaluation.answers import ROWS, Answerer, Question, SavedAnswers
from deltallava_jax.evaluation.tasks import DATA, fetch_error, official_name
from deltallava_jax.inference.model import Model
from deltallava_jax.parallel import hosts
from deltallava_jax.progress import progress_bar

MAX_NEW_TOKENS = 1024  # the default of lmms-eval's LLaVA model

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # an error in the sheet that MMBench's scorer writes


def manifest():
    """Loaded by the entry point lmms_eval.models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("deltallava_jax", simple_class_path=f"{__name__}.DeltaLlava")


class DeltaLlava(lmms):
    """Answers lmms-eval's requests with one of our models."""

    is_simple = True

    def __init__(
        self,
        path: str | Model,
        budget: int | None = None,
        batch_size: int | str = ROWS,
        answers: str | Path | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """path: a workdir, a folder in Hugging Face's or LLaVA's layout, or a loaded model. budget: visual tokens per
        image. batch_size: questions at a time, or "auto". answers: a folder for finished answers, from which a killed
        evaluation resumes. device, max_batch_size: passed by lmms-eval and ignored.

        Several processes of one jax.distributed run share the questions, and each gets all the answers."""
        super().__init__()
        import deltallava_jax

        model = path if isinstance(path, Model) else deltallava_jax.load(path)
        self._answer = Answerer(model, budget=budget, rows=batch_size)
        self._saved = SavedAnswers(Path(answers) if answers else None, jax.process_index())
        self.unread: dict[str, str] = {}  # TASK/SPLIT/DOCUMENT -> why its image cannot be read; its answer is empty
        self._budget = self._answer.budget
        self.batch_size = self._answer.rows

    @property
    def device(self):
        """The device of the tensors in which lmms-eval counts requests."""
        import torch

        return torch.device("cpu")

    def generate_until(self, requests: Sequence) -> list[str]:
        """An answer to each request; its arguments are (context, options, doc_to_visual, document, task, split)."""
        keys = [self._key(request) for request in requests]
        saved = self._saved.read()
        done = self._gather({place: saved[key] for place, key in enumerate(keys) if key in saved})
        pending = [place for place in range(len(keys)) if place not in done]
        # Short prompts first; each process takes every n-th question, for an equal load.
        pending.sort(key=lambda place: (_token_limit(requests[place]), len(requests[place].args[0]), place))
        mine = pending[jax.process_index() :: jax.process_count()]
        new, unread = {}, {}
        bar = progress_bar(
            what="answering", total=len(mine), unit="questions", shown=hosts.leads() and bool(mine), keep=True
        )
        while mine:
            limit = _token_limit(requests[mine[0]])
            chosen = [place for place in mine[: self.batch_size] if _token_limit(requests[place]) == limit]
            mine = mine[len(chosen) :]
            asked = {place: self._question(requests[place]) for place in chosen}
            found = {place: bad for place, bad in asked.items() if isinstance(bad, BadSample)}
            able = [place for place in chosen if place not in found]
            found |= zip(able, self._answer([asked[place] for place in able], limit), strict=True)
            bad = {place: str(answer) for place, answer in found.items() if isinstance(answer, BadSample)}
            answered = {place: answer for place, answer in found.items() if place not in bad}
            self._saved.add({keys[place]: answer for place, answer in answered.items()})
            new, unread = new | answered, unread | bad
            bar.update(len(chosen))
        bar.close()
        unread = self._gather(unread)
        self._report_unread({_document(requests[place]): reason for place, reason in sorted(unread.items())})
        done |= self._gather(new) | dict.fromkeys(unread, "")
        return [UNPRINTABLE.sub("", done[place]) for place in range(len(keys))]

    def loglikelihood(self, requests: Sequence):
        raise NotImplementedError("deltallava_jax does not support tasks that compare likelihoods")

    def generate_until_multi_round(self, requests: Sequence):
        raise NotImplementedError("deltallava_jax does not support tasks of several rounds")

    def _question(self, request) -> Question | BadSample:
        context, _, doc_to_visual, document, task, split = request.args
        try:
            return doc_to_visual(self.task_dict[task][split][document]) or [], context
        except (OSError, Image.DecompressionBombError) as error:
            if getattr(error, "errno", None):  # of the disk, not of the image
                raise
            return BadSample(f"image: {error}", "unreadable")

    def _report_unread(self, unread: dict[str, str]) -> None:
        """Records and logs the documents whose image cannot be read."""
        self.unread |= unread
        if unread and hosts.leads():
            cli.log(f"{len(unread)} answers are empty because an image of the question cannot be read:")
            for document, reason in unread.items():
                cli.log(f"  {document}: {reason}")

    def _key(self, request) -> str:
        """Identifies a request by its data, its prompt and its token limit."""
        context, _, _, document, task, split = request.args
        data = getattr(self.task_dict[task][split], "_fingerprint", "")
        identity = json.dumps([data, context, _token_limit(request), self._budget])
        return f"{_document(request)}/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    @staticmethod
    def _gather(own: dict[int, str]) -> dict[int, str]:
        """The entries of all processes."""
        found = {}
        for text in hosts.gather(json.dumps(list(own.items()))):
            found |= {place: answer for place, answer in json.loads(text)}
        return found


def _document(request) -> str:
    return "/".join(map(str, (*request.args[4:6], request.args[3])))


def _token_limit(request) -> int:
    return int(request.args[1].get("max_new_tokens") or MAX_NEW_TOKENS)


# ------------------------------------------------------------------ in process


def evaluate(model: lmms, tasks: Sequence[str], folder: Path, *, offline: Path | None = None, limit: int = 0) -> dict:
    """{task: {"metrics": {name: value}, "n": documents, "unread": {document: reason}}} of official tasks by name.

    folder: for the files that scorers write. offline: a folder with a local copy for each task (evaluation/tasks.py).
    limit: only the first documents. Raises ConfigError for an unknown task, a missing copy, or data that cannot be
    fetched."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    names = {task: official_name(task, offline is not None) for task in tasks}
    if offline is None:
        manager = TaskManager(verbosity="ERROR")
    else:
        from deltallava_jax.evaluation.tasks import write_offline

        manager = TaskManager(
            verbosity="ERROR", include_path=str(write_offline(tasks, offline, folder)), include_defaults=False
        )
    if unknown := [task for task, name in names.items() if name not in manager.all_tasks]:
        raise ConfigError(f"lmms-eval has no task {unknown[0]!r}; the paper's: {', '.join(DATA)}")
    # As from the command line: scorers write below output_path and get documents without their images.
    options = argparse.Namespace(output_path=str(folder), process_with_media=False)
    with contextlib.redirect_stdout(sys.stderr):  # scorers print
        try:
            found = simple_evaluate(
                model, tasks=list(names.values()), task_manager=manager, cli_args=options, batch_size=model.batch_size,
                limit=limit or None, log_samples=False, bootstrap_iters=0, verbosity="ERROR",
            )  # fmt: skip
        except Exception as error:
            if reason := fetch_error(error):
                raise ConfigError(f"the data of {', '.join(tasks)} cannot be loaded: {reason}") from error
            raise
    return {task: _scores(found, name, getattr(model, "unread", {})) for task, name in names.items()}


def _scores(found: dict, name: str, unread: dict[str, str]) -> dict:
    """The scores of a task or a group of tasks."""
    tasks = found.get("group_subtasks", {}).get(name) or [name]
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, rule = key.partition(",")
        if rule and "_stderr" not in metric and isinstance(value, (int, float)):
            metrics[metric] = float(value)
    own = {document: reason for document, reason in unread.items() if document.split("/")[0] in tasks}
    return {"metrics": metrics, "n": found["n-samples"][name]["effective"], "unread": own}
