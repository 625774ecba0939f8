"""The page: the list of its tabs, its address (run, tab and question), and how it is served."""

import signal
import threading
import warnings

import gradio as gr

from .components import INSTANT, STATIC, XRAY, Page, read_static
from .run_store import expected_time, run_names
from .sessions import MAX_PROMPT, leave, server_address
from .tabs import clouds, compare, evidence, example, how, router, unlearn, xray

TABS = {  # id in the address -> (title, module); static/ID.md introduces the tab
    "example": ("Example", example),
    "unlearn": ("Unlearn", unlearn),
    "compare": ("Compare", compare),
    "xray": ("Token X-ray", xray),
    "clouds": ("Word clouds", clouds),
    "router": ("Router", router),
    "evidence": ("Evidence", evidence),
    "how": ("How it works and its limits", how),
}
MAX_WAITING = 64  # visitors in the queue; each sees their place in it
CLEANUP = (3600, 6 * 3600)  # seconds: how often gradio deletes files, and from which age on


def build() -> gr.Blocks:
    with gr.Blocks(
        title="ALTER: unlearning demo", analytics_enabled=False, delete_cache=CLEANUP
    ) as demo:
        gr.Markdown("# Make a language model forget one topic and keep the rest")
        page = Page()
        with page.tabs.render():
            for name, (title, module) in TABS.items():
                with gr.Tab(title, id=name) as tab:
                    if (STATIC / f"{name}.md").is_file():
                        gr.Markdown(read_static(f"{name}.md"))
                    module.build(page, tab)
        connect(demo, page)
    return demo


def connect(demo: gr.Blocks, page: Page) -> None:
    """What happens across tabs: another run, the address, opening and closing the page."""
    script = read_static("address.js")
    address = {"fn": None, "inputs": [page.run, page.open_tab, page.prompt], "js": script}
    page.run.change(lambda: [None] * len(page.of_run), None, page.of_run, **INSTANT)
    gr.on([page.run.change, page.prompt.change], **address, **INSTANT)
    selected = page.tabs.select(selected_tab, None, page.open_tab, **INSTANT)
    selected.then(**address, **INSTANT)
    restored = [page.tabs, page.open_tab, page.run, page.prompt]
    demo.load(restore, None, restored, **INSTANT)
    times = page.expected_time
    demo.load(lambda: [expected_time()] * len(times), None, times, **INSTANT)
    demo.unload(leave)


def selected_tab(event: gr.SelectData) -> str:
    names, index = list(TABS), event.index
    return names[index if isinstance(index, int) and 0 <= index < len(names) else 0]


def restore(request: gr.Request):
    """The tab, run and question in the address, as far as they exist."""
    query, names = dict(request.query_params), run_names()
    run = query.get("run") if query.get("run") in names else next(iter(names), None)
    prompt = query["prompt"][:MAX_PROMPT] if "prompt" in query else gr.skip()
    # without a tab in the address, the visitor may have selected one already
    tab = query.get("tab")
    tabs = (gr.Tabs(selected=tab), tab) if tab in TABS else (gr.skip(), gr.skip())
    return *tabs, gr.Dropdown(names, value=run), prompt


def launch(demo: gr.Blocks, **kwargs):
    """Serve the page on 127.0.0.1, or on GRADIO_SERVER_NAME. No share link, no telemetry."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    demo.queue(max_size=MAX_WAITING)
    css = read_static("page.css") + read_static("xray.css", XRAY)
    # gradio gives an empty box an aria-label but no role, so screen readers may skip it
    options = {"theme": theme, "css": css, "js": read_static("roles.js")}
    options |= {"ssr_mode": False, "show_error": False, "share": False, "run_history": False}
    options |= {"max_file_size": "50mb", "footer_links": ["settings"]}
    options["server_name"] = server_address()
    if threading.current_thread() is threading.main_thread():
        # the default handler would leave uploads and .zip files behind
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return demo.launch(**options | kwargs)
