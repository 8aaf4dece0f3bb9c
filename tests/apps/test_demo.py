"""The web page, started for real and used by gradio's client and by Chromium."""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.analysis import gradcam
from deltallava_jax.apps import demo
from deltallava_jax.errors import ConfigError
from tests.inference.models import model, picture

ROOT = Path(__file__).parents[2]
QUESTION = "what color is the shape?"


def test_without_gradio_it_is_one_line(tmp_path):
    program = "import sys; sys.modules['gradio'] = None; sys.argv = ['', 'demo', '.']; import runpy\n"
    program += "runpy.run_module('deltallava_jax', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*gradio.*pip install -r requirements-demo.txt\n", done.stderr)


gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["tiny", "--max-new-tokens=12", "--max-bytes=20000", "--max-pixels=10000", *arguments])


@contextmanager
def running(one, *arguments):
    """The page in a thread; its address."""
    options = options_of("--port=0", *arguments)
    options.port = None  # gradio takes the first that is free
    page = demo.make_page(one, options)
    try:
        yield demo.launch(page, options)[1]
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def address():
    with running(model()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


def saved(folder, seed=0, size=64):
    file = folder / f"{seed}.png"
    Image.fromarray(picture(seed)).resize((size, size)).save(file)
    return file


def ask(client, file, question=QUESTION, place=2):
    """The states of the streamed answer, the line below it, and the heat map's file."""
    job = client.submit(file and gradio_client.handle_file(file), question, place, api_name="/ask")
    text, line, heat, _ = job.result(timeout=120)
    shown = [state[0] for state in job.outputs()]
    assert shown[-1] == text
    return shown, line, heat


@pytest.mark.parametrize(("place", "budget"), [(0, 1), (2, 16)])
def test_an_answer_is_the_models_with_its_heat(client, tmp_path, place, budget):
    file = saved(tmp_path, place)
    answer = model().generate(file, QUESTION, budget=budget, max_new_tokens=12)
    shown, line, overlay = ask(client, file, place=place)
    assert shown[0] == "" and shown[-1] == answer and all(map(str.startswith, shown[1:], shown)) and len(set(shown)) > 2
    compiling = r"(, compiling took [\d.]+ m?s more)?"
    assert re.fullmatch(rf"\d+ tokens, the first after [\d.]+ m?s, then [\d.,]+ tokens/s{compiling}", line)
    (heat,) = gradcam.heat_maps(model(), file, QUESTION, budgets=[budget], answer=answer)
    expected = gradcam.overlay(gradcam.tower_image(model(), file), heat)
    assert np.array_equal(np.asarray(Image.open(overlay).convert("RGB")), np.asarray(expected))


def test_errors_are_shown_and_the_page_keeps_running(client, address, tmp_path):
    def refused(words, file, **asked):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            ask(client, file, **asked)

    (tmp_path / "text.png").write_text("no picture")
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused("10 bytes cannot be read; expected JPEG, PNG", tmp_path / "text.png")
    refused("truncated", tmp_path / "cut.png")
    Image.new("1", (101, 100)).save(tmp_path / "large.png")
    refused("101 x 100 pixels; at most 10,000", tmp_path / "large.png")
    refused("choose a picture", None)
    refused("enter a question", saved(tmp_path), question=" ")
    (tmp_path / "heavy.png").write_bytes(whole + bytes(20000))
    with pytest.raises(Exception, match="413|exceed"):
        ask(client, tmp_path / "heavy.png")
    refused("theme.css is not an uploaded file", f"{address}theme.css")
    assert ask(client, saved(tmp_path))[0][-1] == model().generate(picture(), QUESTION, max_new_tokens=12)


def test_a_model_of_one_budget_and_tokens_without_a_place():
    one = model()
    fixed = dataclasses.replace(one.cfg.projector, scale_factor=2)
    components = lambda cfg: {
        part["props"].get("elem_id") or part["props"].get("label"): part["props"]
        for part in demo.make_page(dataclasses.replace(one, cfg=cfg), options_of()).get_config_file()["components"]
    }
    assert components(one.cfg)["tokens"]["visible"]
    assert not components(dataclasses.replace(one.cfg, projector=fixed))["tokens"]["visible"]
    page = components(model(fastv=True).cfg)
    (heat,) = (props for name, props in page.items() if str(name).startswith("Where the answer comes from"))
    assert "FastV drops visual tokens" in heat["placeholder"]
    with pytest.raises(ConfigError, match="the demo needs a whole model; this one has no vision"):
        demo.make_page(dataclasses.replace(one, cfg=dataclasses.replace(one.cfg, vision=None)), options_of())


def test_a_port_in_use_is_one_line(address):
    options = options_of("--port", address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match="is in use"):
        demo.launch(demo.make_page(model(), options), options)


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium")
def test_in_a_browser_which_contacts_no_other_server(address, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:

        def wait_for(selector, found=lambda element: True):
            until = time.monotonic() + 60
            while time.monotonic() < until:
                for element in browser.find_elements("css selector", selector):
                    if found(element):
                        return element
                time.sleep(0.1)
            raise AssertionError(f"no {selector}: {browser.find_element('tag name', 'body').text}")

        browser.get(address)
        wait_for("#places")
        (tmp_path / "text.png").write_text("no picture")
        wait_for("input[type=file]").send_keys(str(tmp_path / "text.png"))
        wait_for(".toast-body", lambda toast: "cannot be read" in toast.text)
        wait_for("input[type=file]").send_keys(str(saved(tmp_path)))  # the bad one has been taken away
        wait_for(".picture img")
        wait_for("textarea, input[type=text]").send_keys(QUESTION, "\n")
        answer = model().generate(picture(), QUESTION, max_new_tokens=12)
        wait_for("#answer textarea", lambda area: area.get_property("value") == answer)
        wait_for("#speed", lambda line: "tokens/s" in line.text)
        wait_for("img[src*='image.png']")
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent if one["documentURL"].startswith(address)}
    assert len(asked) > 5 and all(url.startswith((address, "data:", "blob:")) for url in asked), asked


def test_a_component_without_the_replaced_methods_is_refused():
    """The methods that the demo replaces must exist: a version that renamed them would open files unchecked."""
    picture = demo.gradio().Image(type="filepath")
    demo.guard(picture)
    assert picture.preprocess is demo.path and picture.async_move_resource_to_block_cache is demo.uploaded
    with pytest.raises(ConfigError, match="has no preprocess as the demo expects it"):
        demo.guard(SimpleNamespace())
    other = SimpleNamespace(preprocess=lambda payload: None, async_move_resource_to_block_cache=lambda path: None)
    with pytest.raises(ConfigError, match="has no async_move_resource_to_block_cache as the demo expects it"):
        demo.guard(other)  # no longer a coroutine
