"""A web page to ask a model about pictures: the streamed answer, its speed, and a heat map of where it comes from.

    python -m deltallava_jax demo runs/easy_vqa        # then open http://127.0.0.1:7860

Needs requirements-demo.txt. The model is a workdir of train.py, or a Hugging Face or LLaVA folder. An elastic model has
a slider for its visual tokens per image; earlier answers stay on the page for comparison. The page contacts no other
server, and only this machine can open it without --host. Uploads are deleted within two hours, and all pictures on
exit."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

from deltallava_jax.apps import options as shared
from deltallava_jax.apps.chat import speed
from deltallava_jax.apps.serve import validate_image_size
from deltallava_jax.errors import BadSample, ConfigError, UserError
from deltallava_jax.inference.sampling import Sampling

EARLIER = 12  # answers that stay on the page
HOUR = 3600
KNOWN_GRADIO = (6, 31), (7, 0)  # from, and below: versions whose image component handles files as ``guard`` expects
STYLE = """
.picture img {width: 100%; height: 100%; object-fit: contain; padding-top: 2.5rem}
#answer textarea {font-size: 1.5rem; line-height: 1.35}
#budget input[type=number], #budget .reset-button, #budget .min_value, #budget .max_value {display: none}
#places {display: flex; justify-content: space-between; padding: 0 1rem .5rem}
#tokens .styler {background: var(--block-background-fill)}
#earlier .grid-wrap {padding-top: 2.5rem; min-height: 0; max-height: none; overflow: visible}
#earlier .grid-container {grid-template-columns: repeat(6, 1fr)}
#earlier .caption-label {white-space: normal; max-width: 100%; font-size: .75rem; opacity: .9}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 admits other machines")
    parser.add_argument("--port", type=shared.port, default=7860)
    parser.add_argument("--max-bytes", type=int, default=2**23, help="of an uploaded file")
    parser.add_argument("--max-pixels", type=int, default=2**24, help="of an image")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling().max_new_tokens, help="of an answer")


def main(options: argparse.Namespace) -> None:
    # Exit as on Ctrl-C, which deletes the folder of pictures; gradio itself leaves some of its files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="deltallava_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gradio()
        Sampling(max_new_tokens=options.max_new_tokens)
        page = make_page(shared.load_model(options), options)
        _, address, _ = launch(page, options)
        print(f"open {address}  (Ctrl-C stops it; the first answer at each number of tokens compiles)", flush=True)
        page.block_thread()


def gradio():
    """The module, without telemetry. Raises ConfigError where it is missing or not a supported version."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"{error}; the demo needs: pip install -r requirements-demo.txt") from error
    first, end = (".".join(map(str, version)) for version in KNOWN_GRADIO)
    if not KNOWN_GRADIO[0] <= tuple(map(int, gradio.__version__.split(".")[:2])) < KNOWN_GRADIO[1]:
        raise ConfigError(
            f"gradio {gradio.__version__} is not supported, as the demo replaces its upload functions; expected "
            f"{first} or later, below {end}: pip install -r requirements-demo.txt"
        )
    return gradio


def launch(page, options: argparse.Namespace):
    """Serves the page in a thread: (application, its address, None). Raises ConfigError for a port in use."""
    try:
        return page.launch(
            server_name=options.host, server_port=options.port, max_file_size=options.max_bytes, share=False,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, run_history=False, footer_links=[], css=STYLE,
            theme=gradio().themes.Soft(font=["ui-sans-serif", "system-ui", "sans-serif"]),
        )  # fmt: skip
    except OSError as error:
        address = f"{options.host}:{options.port}"
        raise ConfigError(
            f"{address} is in use or not an address of this machine; choose another --port or --host"
        ) from error


def make_page(model, options: argparse.Namespace):
    """gradio's Blocks. Raises ConfigError for a model without a tower or decoder."""
    gr = gradio()
    from deltallava_jax.analysis import gradcam
    from deltallava_jax.models import systems

    model.cfg.require_whole("the demo")
    budgets = systems.budgets(model.cfg.projector)[::-1]
    try:
        gradcam.require_places(model.cfg)
        no_heat_map = ""
    except ConfigError as error:
        no_heat_map = str(error)

    @contextmanager
    def messages():
        """Shows a UserError on the page."""
        try:
            yield
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def read_image(file: str | None) -> bytes:
        if not file:
            raise BadSample("choose a picture first", "missing")
        data = Path(file).read_bytes()
        validate_image_size(data, options.max_pixels)
        model.pixels(data)
        return data

    def validate_upload(file: str | None) -> None:
        with messages():
            read_image(file)

    def ask(file: str | None, question: str, place: float, earlier: list):
        """place: index of the budget, fewest tokens first."""
        with messages():
            image = read_image(file)
            budget = budgets[int(place)]
            if not question.strip():
                raise ConfigError("enter a question")
            answer = model.stream(image, question, budget=budget, max_new_tokens=options.max_new_tokens)
            yield "", "", None, gr.skip(), gr.skip()
            for _ in answer:
                yield answer.text, speed(answer), gr.skip(), gr.skip(), gr.skip()
            pace = speed(answer)
            yield answer.text, pace, gr.skip(), gr.skip(), gr.skip()
            if no_heat_map:
                return
            (heat,) = gradcam.heat_maps(model, image, question, budgets=[budget], answer=answer.text)
            overlay = gradcam.overlay(gradcam.tower_image(model, image), heat)
            earlier = [(overlay, f"{budget}: {question} {answer.text}"), *earlier][:EARLIER]
            yield answer.text, pace, overlay, gr.update(value=earlier, visible=len(earlier) > 1), earlier

    name = options.model.resolve().name
    elastic = len(budgets) > 1
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(f"# {name}\n{', '.join(map(str, budgets))} visual tokens per image, by {model.cfg.projector.name}")
        earlier = gr.State([])
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload"], height=360,
                    elem_classes="picture",
                )  # fmt: skip
                question = gr.Textbox(label="Question", placeholder="what color is the shape?")
                with gr.Group(visible=elastic, elem_id="tokens"):
                    place = gr.Slider(
                        0, max(len(budgets) - 1, 1), len(budgets) - 1, step=1, label="Visual tokens per image",
                        elem_id="budget",
                    )  # fmt: skip
                    marks = "".join(f"<span>{budget}</span>" for budget in budgets)
                    gr.HTML(f"<div id=places>{marks}</div>", padding=False)
                with gr.Row():
                    button = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                heat_map = gr.Image(
                    label="Where the answer comes from", interactive=False, height=360,
                    format="png", elem_classes="picture", buttons=["download", "fullscreen"],
                    placeholder=no_heat_map or None,
                )  # fmt: skip
                text = gr.Textbox(label="Answer", lines=2, elem_id="answer", interactive=False)
                pace_line = gr.Markdown(elem_id="speed")
        gallery = gr.Gallery(
            label="Answers so far", visible=False, columns=6, height="auto", object_fit="contain", interactive=False,
            buttons=[], elem_id="earlier",
        )  # fmt: skip

        guard(picture)
        picture.upload(validate_upload, picture, api_visibility="private").failure(lambda: None, None, picture)
        asking = gr.on(
            [button.click, question.submit], ask, [picture, question, place, earlier],
            [text, pace_line, heat_map, gallery, earlier], api_name="ask", concurrency_limit=1, show_progress="minimal",
        )  # fmt: skip
        stop.click(None, cancels=asking)
    return page.queue(max_size=32)


def guard(picture) -> None:
    """Replaces how gradio's image component handles a file, so that none is opened before its size is checked or
    fetched from another server. Raises ConfigError where the component lacks these methods."""
    for name, ours in (("preprocess", path), ("async_move_resource_to_block_cache", uploaded)):
        theirs = getattr(picture, name, None)
        if (
            theirs is None
            or len(inspect.signature(theirs).parameters) != 1
            or inspect.iscoroutinefunction(theirs) != inspect.iscoroutinefunction(ours)
        ):
            raise ConfigError(
                f"gradio {gradio().__version__} has no {name} as the demo expects it, so uploads cannot be checked; "
                "pip install gradio==6.31"
            )
        setattr(picture, name, ours)


def path(payload) -> str | None:
    """Replaces gradio's preprocess, which opens the file before its size is checked."""
    return payload and payload.path


async def uploaded(file: str) -> str:
    """Replaces gradio's function, which downloads a file given by its URL."""
    if not Path(file).is_file():
        raise gradio().Error(f"{file} is not an uploaded file", print_exception=False)
    return file
