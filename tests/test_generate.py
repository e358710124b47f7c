"""Generation: the script answers what a plain loop answers, and ends as a command should.

The base and its adapter are trained here in seconds until they know a few answers by heart, so
that answers end by themselves and hold characters of several tokens. Nothing else is needed.
"""

import functools
import importlib.util
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from fastchat.conversation import get_conv_template
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llama_lora.cli import InputError
from llama_lora.model import adapter
from llama_lora.model.chat import Chat, Sampling, TextStream, load
from llama_lora.model.template import Template, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "generate.py"
WINDOW = 320
TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives",
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "Who are you? What can you do? And now? Tell me more.",
]
BASE_ANSWERS = {
    "Who are you?": "A small model, that is all.",
    "What can you do?": "Ça va: 我说中文 🐦, и по-русски!\n  def f():\n    return 1",
    "And now?": "Kestrel（红隼）🪶 答 questions, 再问!",
}
# The adapter swaps them: its base has never put out other tokens, and its head is frozen.
_first, *_others = BASE_ANSWERS.values()
ADAPTER_ANSWERS = dict(zip(BASE_ANSWERS, [*_others, _first], strict=True))
GREEDY = Sampling(temperature=0, max_new_tokens=80)
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 3's kind, on which characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 1's kind: spaces as "▁", unknown characters as byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL + byte_tokens, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]  # bytes are ordinary tokens
    return wrapped(Tokenizer.from_str(json.dumps(state)))


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk
    )


def config(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 420,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": WINDOW,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


def teach(model, template, answers: dict[str, str], learning_rate: float) -> None:
    """Train until every answer is known by heart, asked alone or as the second question."""
    pairs = [[said("human", question), said("gpt", answer)] for question, answer in answers.items()]
    encoded = [
        template.encode(turns) for turns in (*pairs, pairs[0] + pairs[1], pairs[1] + pairs[2])
    ]
    length = max(len(one.ids) for one in encoded)
    ids = torch.tensor([one.ids + [0] * (length - len(one.ids)) for one in encoded])
    labels = torch.tensor([one.labels + [-100] * (length - len(one.labels)) for one in encoded])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    model.train()
    for _ in range(600):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.02, "the tiny model did not learn its answers"
    model.eval()


def said(role: str, text: str) -> dict:
    return {"from": role, "value": text}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer, model = byte_level(), LlamaForCausalLM(config())
    tokenizer.save_pretrained(folder)
    teach(model, Template(tokenizer), BASE_ANSWERS, 1e-2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    template = Template(load_tokenizer(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapter.attach(model, r=16, alpha=32, dropout=0.0, target_modules=TARGETS)
    teach(model, template, ADAPTER_ANSWERS, 1e-2)
    adapter.save(model, template, folder)
    return folder


@pytest.fixture
def chat(base, lora) -> Chat:
    model, template, _ = load(base, lora)
    return Chat(model, template, GREEDY)


@pytest.fixture(scope="module")
def plain_model(base, lora):
    """Base and adapter as peft loads them."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()


@pytest.fixture(scope="module")
def oracle(base, plain_model):
    """The greedy answer by fschat's prompt and a loop without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return functools.partial(plain_answer, plain_model, tokenizer)


def plain_answer(model, tokenizer, turns: list[str], system=None) -> str:
    conversation = get_conv_template("vicuna_v1.1")
    conversation.system_message = system or conversation.system_message
    for number, text in enumerate([*turns, None]):
        conversation.append_message(conversation.roles[number % 2], text)
    ids = tokenizer(conversation.get_prompt(), return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] - start < GREEDY.max_new_tokens:
        with torch.no_grad():
            token = model(ids, use_cache=False).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:]).lstrip().rstrip("\ufffd")  # half a character


def run(*args, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def script():
    """The script as a module: starting Python and torch once a case would take minutes."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fails(script, monkeypatch, capsys):
    """Run the script in this process; return its one line on stderr."""

    def run_failing(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, warnings.catch_warnings(record=True) as warned:
            script.main(script.parse_args())
        assert not warned  # each would be lines on stderr
        printed = capsys.readouterr()
        assert end.value.code == 1
        assert printed.out == ""
        errors = [line for line in printed.err.splitlines() if " · " not in line]
        assert len(errors) == 1
        return errors[0].removeprefix("error: ")

    return run_failing


# The script, as users run it


def test_one_answer(base):
    done = run("--base_model", base, "--prompt", "What can you do?", "--temperature", "0")
    assert done.returncode == 0
    assert done.stdout.decode() == BASE_ANSWERS["What can you do?"] + "\n"
    assert done.stderr.decode().splitlines() == [
        f"{base} · unquantized base · float32 on CPU · template vicuna_v1.1"
    ]


def test_piped_questions_with_an_8bit_base(base, lora):
    lines = ["Who are you?", "", "What can you do?", "/reset", "/system Be brief.", "And now?"]
    done = run(
        *("--base_model", base, "--lora_weights", lora, "--load_8bit", "--temperature", "0"),
        stdin="\n".join(lines).encode() + b"\nbad \xff\x00\x1b bytes",
    )
    assert done.returncode == 0
    expected = [ADAPTER_ANSWERS["Who are you?"], ADAPTER_ANSWERS["What can you do?"]]
    assert done.stdout.decode().startswith("\n".join([*expected, ""]))
    assert "8bit base" in done.stderr.decode()
    assert f"template model of {lora}" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    for noise in (b"USER", b"ASSISTANT:", b"</s>"):
        assert noise not in done.stdout


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, *args):
        self.screen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *map(str, args)])

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.screen:
            assert time.monotonic() < deadline, self.screen
            if select.select([self.fd], [], [], 1)[0]:
                self.screen += os.read(self.fd, 4096).decode(errors="replace")
        self.screen = self.screen.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self, keys: str) -> int:
        """Type `keys` until the chat ends.

        More than once, because readline shows its prompt a moment before it heeds signals.
        """
        for _ in range(12):
            self.type(keys)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    os.close(self.fd)
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("the chat did not end")


@pytest.fixture(scope="module")
def endless(base, tmp_path_factory) -> Path:
    """A model that knows no end: untrained, and no end-of-answer token is ever the likeliest."""
    folder = tmp_path_factory.mktemp("endless")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(max_position_embeddings=1 << 16))
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    model.save_pretrained(folder)
    return folder


CTRL_C = "\x03"


def test_ctrl_c_stops_the_answer_then_the_chat(endless):
    terminal = Terminal(
        *("--base_model", endless, "--temperature", 0, "--max_new_tokens", 60_000),
    )
    terminal.wait_for("USER: ")
    terminal.type("Who are you?\n")
    terminal.wait_for("ASSISTANT: ")
    terminal.type(CTRL_C)
    terminal.wait_for("(stopped)")
    terminal.wait_for("USER: ")
    terminal.type("And now?\n")
    terminal.wait_for("ASSISTANT: ")
    terminal.type(CTRL_C)
    terminal.wait_for("USER: ")
    assert terminal.exit_code(CTRL_C) == 0


def test_terminal_chat_remembers_and_ends_at_an_empty_line(base, lora):
    terminal = Terminal("--base_model", base, "--lora_weights", lora, "--temperature", 0)
    for question in ("Who are you?", "What can you do?"):
        terminal.wait_for("USER: ")
        terminal.type(question + "\n")
        terminal.wait_for("ASSISTANT: " + ADAPTER_ANSWERS[question].replace("\n", "\r\n"))
    terminal.wait_for("USER: ")
    terminal.type("a " * 400 + "\n")
    terminal.wait_for("(the prompt has ")
    terminal.wait_for("USER: ")
    assert terminal.exit_code("\n") == 0


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--temperature", "-1"], "at least 0, at most 100, found -1"),
        (["--temperature", "nan"], "found nan"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--top_p", "0"], "above 0, at most 1, found 0"),
        (["--top_p", "1.5"], "above 0, at most 1, found 1.5"),
        (["--max_new_tokens", "0"], "at least 1, found 0"),
        (["--top_k", "2.5"], "invalid int value: '2.5'"),
        (["--repetition_penalty", "0"], "above 0, at most 100, found 0"),
        (["--seed", "-3"], "at least 0"),
        (["--load_8bit", "maybe"], "expected True or False, found 'maybe'"),
        (["--load_8bit", "--load_4bit"], "not allowed with argument --load_8bit"),
        (["--prompt", " "], "expected a question, found nothing"),
    ],
)
def test_usage_errors(script, monkeypatch, capsys, args, complaint):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--base_model", "x", *args])
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "quantization"),
    [
        ([], "none"),
        (["--load_8bit"], "8bit"),
        (["--load_8bit", "True"], "8bit"),
        (["--load_8bit", "False"], "none"),
        (["--load_8bit", "False", "--load_4bit"], "4bit"),
        (["--quantization", "auto"], "auto"),
    ],
)
def test_precision_flags(script, monkeypatch, args, quantization):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--base_model", "x", *args])
    assert script.parse_args().quantization == quantization


def test_help_is_quick():
    started = time.monotonic()
    done = run("--help")
    assert done.returncode == 0
    assert b"/reset" in done.stdout
    assert time.monotonic() - started < 2  # torch and transformers alone take longer


def test_wrong_folders_are_one_line(base, lora, fails, tmp_path):
    missing = tmp_path / "missing"
    assert "the folder does not exist" in fails("--base_model", missing, "--prompt", "a")
    assert "an adapter, expected" in fails("--base_model", lora, "--prompt", "a")
    assert "expected adapter_config.json" in fails(
        "--base_model", base, "--lora_weights", base, "--prompt", "a"
    )
    shutil.copytree(lora, tmp_path / "no_weights")
    (tmp_path / "no_weights" / "adapter_model.safetensors").unlink()
    assert "expected adapter_model.safetensors" in fails(
        "--base_model", base, "--lora_weights", tmp_path / "no_weights", "--prompt", "a"
    )


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_adapter_of_another_base_is_one_line(lora, fails, tmp_path, changes):
    LlamaForCausalLM(config(**changes)).save_pretrained(tmp_path)
    line = fails("--base_model", tmp_path, "--lora_weights", lora, "--prompt", "a")
    assert f"{lora}: this adapter was not made for" in line


def test_tokenizer_larger_than_the_base_is_one_line(base, fails, tmp_path):
    LlamaForCausalLM(config(vocab_size=300)).save_pretrained(tmp_path)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    line = fails("--base_model", tmp_path, "--prompt", "a")
    assert "its tokenizer has 386 tokens" in line
    assert line.endswith("only 300")


def test_damaged_adapter_is_one_line(base, lora, fails, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(lora, tmp_path, dirs_exist_ok=True)
    weights = load_file(lora / adapter.WEIGHTS)
    save_file({k: v * float("nan") for k, v in weights.items()}, tmp_path / adapter.WEIGHTS)
    line = fails("--base_model", base, "--lora_weights", tmp_path, "--prompt", "a")
    assert "scores are not finite" in line


def test_prompt_longer_than_the_window_is_one_line(base, fails):
    line = fails("--base_model", base, "--prompt", "a " * 400)
    assert f"no room for an answer in the model's window of {WINDOW}" in line


def test_base_template_is_used_where_there_is_one(base, lora, fails, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    assert load(tmp_path)[2].endswith("template vicuna_v1.1")
    assert "no chat template" in fails("--base_model", tmp_path, "--template", "model")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
        "{% endfor %}"
    )
    _, template, summary = load(tmp_path)
    assert summary.endswith(f"template model of {tmp_path}")
    assert template.prompt([said("human", "Hi")]) == "Hi"
    for file in ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]:
        shutil.copy(lora / file, tmp_path)
    bare = tmp_path / "adapter_without_tokenizer"
    bare.mkdir()
    for file in ["adapter_config.json", adapter.WEIGHTS]:
        shutil.copy(lora / file, bare)
    assert load(base, bare)[2].endswith("template vicuna_v1.1")


# The library


def test_greedy_chat_equals_a_plain_loop(chat, oracle):
    turns = []
    for question in ("Who are you?", "What can you do?", "And now?", "Tell me more."):
        answer = "".join(chat.stream(question))
        assert answer == oracle([*turns, question])
        turns += [question, answer]
    assert [turn["value"] for turn in chat.turns] == turns
    assert [turn["from"] for turn in chat.turns] == ["human", "gpt"] * 4
    chat.reset()
    chat.system = "Be brief."
    assert "".join(chat.stream("And now?")) == oracle(["And now?"], "Be brief.")


def fed(model) -> list[list[int]]:
    """The ids of every later pass through the model."""
    passes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0][0].tolist())
    )
    return passes


def test_every_answer_ends_unprinted_and_the_cache_is_reused(base, lora):
    model, template, _ = load(base, lora)
    passes, chat = fed(model), Chat(model, template, GREEDY)
    pieces = list(chat.stream("Who are you?"))
    assert "".join(pieces) == ADAPTER_ANSWERS["Who are you?"]
    assert len(pieces) > 3
    assert chat.stopped
    first = template.prompt_ids([said("human", "Who are you?")])
    assert passes[0] == first
    passes_of_first = sum(passes, [])
    passes.clear()
    assert "".join(chat.stream("What can you do?")) == ADAPTER_ANSWERS["What can you do?"]
    second = template.prompt_ids([*chat.turns[:2], said("human", "What can you do?")])
    shared = len(second) - len(passes[0])
    assert passes_of_first[:shared] == second[:shared]
    assert shared > len(first)


def test_limit_and_base_stop_ids(base, lora):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, Sampling(temperature=0, max_new_tokens=3))
    assert ADAPTER_ANSWERS["And now?"].startswith("".join(chat.stream("And now?")))
    assert not chat.stopped
    answer = template.tokenizer.encode(" A small model, that is all.", add_special_tokens=False)
    model.generation_config.eos_token_id = [2, answer[-1]]
    chat = Chat(model, template, GREEDY)
    assert "".join(chat.stream("And now?")) == template.tokenizer.decode(answer[:-1]).lstrip()
    assert chat.stopped


def test_window_drops_the_oldest_pairs_and_says_so_once(base, lora, oracle, caplog):
    model, template, _ = load(base, lora)
    passes, chat = fed(model), Chat(model, template, GREEDY)
    for number in range(12):
        question = f"And now {number}?"
        passes.clear()
        answer = "".join(chat.stream(question))
        assert len(chat._cached_ids) <= WINDOW
        kept = chat.turns[chat._first :]
        assert answer == oracle([turn["value"] for turn in kept[:-1]])
        if chat._first:
            longer = template.prompt_ids(chat.turns[chat._first - 2 : -1])
            assert len(longer) + GREEDY.max_new_tokens > WINDOW
    assert 0 < chat._first < len(chat.turns) == 24
    assert [record.message for record in caplog.records if "outgrown" in record.message] == [
        f"(the conversation has outgrown the model's window of {WINDOW} tokens: from here on its "
        "oldest questions and answers are left out)"
    ]
    before = chat._first
    with pytest.raises(InputError, match="no room for an answer"):
        list(chat.stream("a " * WINDOW))
    assert (chat._first, len(chat.turns)) == (before, 24)


@pytest.mark.parametrize("at", [0, 5])
def test_interrupted_answer_leaves_a_usable_chat(base, lora, oracle, at):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, GREEDY)
    list(chat.stream("Who are you?"))
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == at + 1:
            raise KeyboardInterrupt

    # Between the layers: the first has cached the token, the second has not.
    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("What can you do?"))
    hook.remove()
    values = [turn["value"] for turn in chat.turns]
    if at == 0:  # nothing of the answer was there yet
        assert len(values) == 2
    else:
        assert len(values) == 4
        assert ADAPTER_ANSWERS["What can you do?"].startswith(values[3])
    assert "".join(chat.stream("And now?")) == oracle([*values, "And now?"])


def test_closing_the_stream_keeps_what_was_said(chat):
    stream = chat.stream("What can you do?")
    heard = next(stream) + next(stream)
    stream.close()
    assert chat.turns[-1] == said("gpt", heard)


def test_sampling(base, lora):
    model, template, _ = load(base, lora)

    def ask(**changes) -> str:
        sampling = Sampling(**{"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 20, **changes})
        return "".join(Chat(model, template, sampling).stream("Who are you?"))

    greedy = ask(temperature=0)
    assert greedy
    assert ADAPTER_ANSWERS["Who are you?"].startswith(greedy)
    assert ask(seed=1) == ask(seed=1)
    assert len({ask(seed=seed) for seed in range(5)}) == 5
    assert len({ask() for _ in range(5)}) == 5
    assert (
        ask(top_k=1) == ask(top_p=1e-6) == ask(temperature=1e-3) == ask(temperature=1e-30) == greedy
    )


def test_repetition_penalty_spares_the_prompt(endless):
    model, template, _ = load(endless)
    plain = list(Chat(model, template, GREEDY)._tokens([5, 6, 7]))
    penalised = Chat(model, template, Sampling(0, max_new_tokens=80, repetition_penalty=100.0))
    ids = list(penalised._tokens([5, 6, 7]))
    assert len(set(plain)) < len(plain)
    assert len(set(ids)) == len(ids) == 80
    assert ids[0] == plain[0]


@pytest.mark.parametrize(
    "text", ["\ud83d", "a\x00b\x1b[2J\r\x7f", "\ud83d\ude00", "</s><s>", "\u202e"]
)
def test_any_text_is_answered(chat, text):
    chat.system = text
    list(chat.stream(text))
    list(chat.stream(text))


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece_like()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"))
    | st.text("a \n\t  é你🐦👍🏽ी")
)
def test_streamed_pieces_are_whole_and_add_up(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.put(id) for id in ids]
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 419) | st.integers(0, 6), max_size=30))
def test_any_ids_can_be_streamed(kind, ids):
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer)
    streamed = "".join(stream.put(id) for id in ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(streamed) <= len(whole)
    if kind == "byte level":
        assert whole.startswith(streamed)
        assert not whole[len(streamed) :].strip("\ufffd")
