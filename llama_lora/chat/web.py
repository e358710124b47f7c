"""A chat in the browser: one model, two answers side by side; nothing leaves the machine."""

import html
import importlib.util
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial

from llama_lora.chat.adapters import BASE, Adapters
from llama_lora.chat.out_of_memory import OutOfMemory
from llama_lora.chat.sampling import Sampling, generator
from llama_lora.cli import InputError
from llama_lora.text import sound_text

BUTTONS = "Send", "Stop", "Retry", "New chat"
NOTHING = "nothing"  # is shown beside the answers
CSS = ".message-content * { white-space: pre-wrap } footer { display: none }"


# The settings that have a slider, in the order of the sliders.
SLIDERS = "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"


def check_gradio() -> None:
    """Raise `InputError` if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("--web needs gradio: pip install -r requirements-web.txt")


def check_port(host: str, port: int) -> None:
    """Raise `InputError` if the page cannot listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise refused(host, port, error.strerror) from None


def refused(host: str, port: int, reason: str) -> InputError:
    return InputError(
        f"--web: cannot listen on {host}, port {port}: {reason}; choose another --port"
    )


def serve(args, load: Callable[..., Adapters]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        args: `host` and `port` to listen on (whoever can reach them can use the model), and the
            page's first settings: `system` and the fields of `Sampling`.
        load: loads the model and its adapters from `args`, once nothing else can fail.

    Raises:
        InputError: gradio is missing, or the port is in use.
    """
    check_port(args.host, args.port)
    check_gradio()
    page = launched(build(load(args), Sampling.of(args), args.system), args.host, args.port)
    print(f"{page.local_url} · Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)


def launched(page, host: str, port: int):
    """`page`, served from now on.

    Raises:
        InputError: the port has been taken since it was checked.
    """
    import gradio

    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # as addresses write IPv6
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),
            css=CSS,
        )
    except OSError:  # gradio's error names neither host nor cause
        raise refused(host, port, "taken, or not there within 5 seconds") from None
    return page


def build(adapters: Adapters, sampling: Sampling, system: str | None):
    """The page as gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # else its makers are told of each start
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    answering = Answering(adapters, sampling)
    names = adapters.names
    beside = BASE if len(names) > 1 else NOTHING
    with gr.Blocks(title="llama-lora", analytics_enabled=False) as page:
        with gr.Row():
            left_name = gr.Dropdown(names, value=names[0], label="Answers", elem_id="left-name")
            right_name = gr.Dropdown(
                [NOTHING, *names], value=beside, label="Beside it", elem_id="right-name"
            )
        with gr.Row():
            chats = chatbot(gr, names[0]), chatbot(gr, beside)
        status = gr.HTML(elem_id="status")
        question = gr.Textbox(
            placeholder="Ask something",
            show_label=False,
            max_lines=9,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            send, stop, retry, new = (
                gr.Button(label, variant=variant, elem_id=label.split()[0].lower())
                for label, variant in zip(BUTTONS, ("primary", *["secondary"] * 3), strict=True)
            )
        settings = settings_of(gr, sampling, system, answering.window)
        turns = gr.State([]), gr.State([])

        state, outputs = [left_name, right_name, *turns, *settings], [*chats, *turns, status]
        shared = {"show_progress": "hidden", "api_visibility": "private"}
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", **shared}
        at_once = {"queue": False, **shared}
        asked = gr.on(
            [send.click, question.submit],
            partial(answering.ask_and_clear, gr.skip),
            [question, *state],
            [question, *outputs],
            **one_at_a_time,
        )
        retried = retry.click(answering.retry, state, outputs, **one_at_a_time)
        # A running answer has to end first, or its last piece would come back.
        stopping = {"cancels": [asked, retried], "api_visibility": "private"}
        stop.click(None, **stopping)
        new.click(None, **stopping).then(lambda: ([], [], [], [], ""), None, outputs, **at_once)
        left_name.change(None, **stopping).then(
            lambda name: gr.Chatbot(label=name), left_name, chats[0], **at_once
        )
        right_name.change(None, **stopping).then(
            lambda name: (gr.Chatbot([], label=name, visible=name != NOTHING), []),
            right_name,
            [chats[1], turns[1]],
            **at_once,
        )
        for chat, kept in zip(chats, turns, strict=True):
            chat.clear(None, **stopping).then(lambda: ([], []), None, [chat, kept], **at_once)
    return page


def chatbot(gr, name: str):
    """One side's conversation."""
    # What the model writes is shown as it is: rendered Markdown would fetch its pictures.
    return gr.Chatbot(
        label=name,
        visible=name != NOTHING,
        height="60vh",
        min_width=320,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],
        feedback_options=None,
    )


def settings_of(gr, sampling: Sampling, system: str | None, window: int) -> list:
    """The system message, and a slider for each of `SLIDERS`."""

    def slider(label: str, low, high, value, step=0.05):
        return gr.Slider(min(low, value), max(high, value), value, step=step, label=label)

    with gr.Accordion("Settings", open=False):
        text = gr.Textbox(system or "", label="System message", placeholder="the template's own")
        with gr.Row():
            longest = min(sampling.max_new_tokens, window)
            return [
                text,
                slider("Temperature", 0, 2, sampling.temperature),
                slider("Top p", 0.05, 1, sampling.top_p),
                slider("Top k", 0, 200, sampling.top_k, step=1),
                slider("Repetition penalty", 1, 2, sampling.repetition_penalty),
                slider("Longest answer", 1, window, longest, step=1),
            ]


@dataclass
class Side:
    """One of the two conversations: whom it is with, its turns, and a note about it."""

    name: str
    turns: list[dict]
    note: str = ""


class Answering:
    """Answers what the page asks; the conversations themselves stay in the browser session."""

    def __init__(self, adapters: Adapters, sampling: Sampling):
        self._adapters, self._sampling = adapters, sampling
        self._lock = threading.Lock()  # a stopped answer may still be in its last token
        self._decoders = {}  # of each side: what they have computed is reused for the next question
        self.window = self._decoder(0, adapters.names[0]).prompter.window

    def ask(self, question: str, left_name, right_name, left, right, *settings):
        """Ask both sides; yields what is shown and kept, again and again until they are done."""
        asked = {"from": "human", "value": sound_text(question)}
        sides = [Side(left_name, [*left, asked]), Side(right_name, [*right, asked])]
        yield from self._answer(sides, *settings)

    def ask_and_clear(self, unchanged: Callable, question: str, *state):
        """`ask`, and clear the box that the question came from; a blank question is ignored."""
        if not question.strip():
            yield tuple(unchanged() for _ in range(6))
            return
        box = ""
        with closing(self.ask(question, *state)) as updates:
            for update in updates:
                yield box, *update
                box = unchanged()  # since it may already hold the next question

    def retry(self, left_name, right_name, left, right, *settings):
        """`ask` the last question once more."""
        sides = [Side(left_name, unanswered(left)), Side(right_name, unanswered(right))]
        yield from self._answer(sides, *settings)

    def _answer(self, sides: list[Side], system: str, *numbers):
        sampling = replace(self._sampling, **dict(zip(SLIDERS, numbers, strict=True)))
        for side in sides:
            if side.name == NOTHING:
                side.turns = []
        yield shown(sides)
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(self._stream(place, side, sampling, system)))
                for place, side in enumerate(sides)
                if side.turns
            ]
            for _ in alone(self._lock, in_turn(streams)):
                yield shown(sides)
        yield shown(sides)

    def _stream(self, place: int, side: Side, sampling: Sampling, system: str) -> Iterator[None]:
        """Write the answer of a side into its turns, piece by piece."""
        decoder = self._decoder(place, side.name)
        head = [{"from": "system", "value": sound_text(system)}] if system.strip() else []
        try:
            prompt = decoder.prompter.fit([*head, *side.turns], sampling.max_new_tokens)
            if prompt.left_out:
                side.note = "the oldest questions and answers no longer fit and are left out"
            random = generator(decoder.model, sampling.seed)
            asked, answer = side.turns, ""
            with closing(decoder.stream(prompt.ids, sampling, random)) as pieces:
                for piece in pieces:
                    answer += piece
                    side.turns = [*asked, {"from": "gpt", "value": answer}]
                    yield
            if decoder.finish_reason == "length":
                side.note = "cut off: the longest answer or the model's window is used up"
        except OutOfMemory as error:
            side.note = error.told("a new chat")
        except InputError as error:
            side.note = str(error)

    def _decoder(self, place: int, name: str):
        if self._decoders.get(place, ("", None))[0] != name:
            self._decoders[place] = name, self._adapters.decoder(name)
        return self._decoders[place][1]


def in_turn(streams: list[Iterator]) -> Iterator[None]:
    """Take from each stream in turn until all have ended; yields after each round."""
    while streams:
        streams = [stream for stream in streams if next(stream, StopIteration) is not StopIteration]
        yield


def alone(lock: threading.Lock, rounds: Iterator[None]) -> Iterator[None]:
    """`rounds`, each of them under the lock."""
    while True:
        with lock:
            if next(rounds, StopIteration) is StopIteration:
                return
        yield


def unanswered(turns: list[dict]) -> list[dict]:
    """`turns` up to the last question."""
    return turns[:-1] if turns and turns[-1]["from"] == "gpt" else turns


def shown(sides: list[Side]) -> tuple:
    """What the page shows and keeps: both chats, both conversations, and the notes."""
    notes = " · ".join(f"{side.name}: {side.note}" for side in sides if side.note)
    return (
        *(messages(side.turns) for side in sides),
        *(side.turns for side in sides),
        html.escape(notes),
    )


def messages(turns: list[dict]) -> list[dict]:
    """`turns` as gradio shows them, escaped, since it takes even plain text for HTML."""
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {
            "role": roles[turn["from"]],
            "content": [{"type": "text", "text": html.escape(turn["value"])}],
        }
        for turn in turns
    ]
