"""Sessions and jobs: one job at a time, stop, closed tabs, access to models; safe Markdown."""

import os
import re
import threading
import traceback
from contextlib import contextmanager

import gradio as gr

try:
    from spaces import GPU  # on a ZeroGPU Space, lends a GPU to the decorated function
except ImportError:
    GPU = lambda duration: lambda function: function  # noqa: E731

from ..errors import Interrupted, UserError
from ..models.built_in import MODELS
from ..models.loading import INTERRUPT

JOB = threading.Lock()  # held while a model trains or answers
CHANGE = threading.Lock()  # held while OWNER and INTERRUPT change together
STOP: dict[str, threading.Event] = {}  # session -> set when its visitor asks to stop
OWNER: list[str] = []  # session whose job is running
GPU_SECONDS = 120  # for which a Space lends a GPU to a job
TICK = 0.5  # seconds between two updates of the page
MAX_PROMPT, MAX_TEXT = 4000, 20_000  # characters
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@contextmanager
def job(request: gr.Request):
    """Hold the machine for one job. `leave` interrupts it when the visitor closes the tab."""
    with JOB:
        with CHANGE:
            INTERRUPT.clear()
            OWNER[:] = [request.session_hash or ""]
        try:
            yield
        finally:
            with CHANGE:
                OWNER.clear()
                INTERRUPT.clear()


def model_job(outputs: int):
    """Decorator: makes a handler of a generator. Errors go to the status, its last output."""

    def decorate(generator):
        def handler(request: gr.Request, **inputs):
            try:
                with job(request):
                    yield from generator(**inputs)
            except Exception as error:
                yield *[gr.skip()] * (outputs - 1), error_sentence(error)

        handler.__name__ = generator.__name__
        return GPU(duration=GPU_SECONDS)(handler)

    return decorate


def request_stop(request: gr.Request) -> str:
    if not (event := STOP.get(request.session_hash)):
        return "You have no job running."
    event.set()
    return "Stopping. The completed steps are kept."


def leave(request: gr.Request) -> None:
    """The visitor has closed the tab."""
    if event := STOP.pop(request.session_hash, None):
        event.set()
    with CHANGE:
        if request.session_hash in OWNER:
            INTERRUPT.set()


def server_address() -> str:
    return os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[0])


def available_models() -> list[str]:
    """The built-in models and those in ALTER_MODELS: folders or hub ids, separated by commas."""
    names = (name.strip() for name in os.environ.get("ALTER_MODELS", "").split(","))
    return [*MODELS, *filter(None, names)]


def check_access(model: str) -> str:
    """`model`, or UserError: on a public page, folders and gated models are the owner's alone."""
    if server_address() not in LOOPBACK and model not in available_models():
        raise UserError(
            f"Model {model!r} is not available on this public page. Choose one of "
            f"{', '.join(available_models())}. The owner can add models with ALTER_MODELS."
        )
    return model


def escape_markdown(text: str) -> str:
    """Text that a Markdown component shows as it is: no markup, no links, no lists."""
    escaped = "".join(c if c.isalnum() or c in " .,:;()'/" else f"&#{ord(c)};" for c in text)
    link_or_list = r"(?<=\w)[.:](?=[\w/])|(?<=\d)\.|(?<=\d)\)"
    return re.sub(link_or_list, lambda match: f"&#{ord(match[0])};", escaped)


def error_sentence(error: Exception) -> str:
    """What the page shows of an error. The terminal gets the traceback of an unexpected one."""
    if isinstance(error, UserError):
        return escape_markdown(str(error))
    if isinstance(error, Interrupted):
        return "Cancelled: the tab was closed."
    traceback.print_exception(error)
    return f"Unexpected error ({type(error).__name__}). See the terminal for details."
