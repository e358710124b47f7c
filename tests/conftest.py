"""A tiny Llama and its tokenizers, made on the spot, and the scripts run as users run them."""

import gc
import io
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
from hypothesis import settings

# The same examples in every run: a failure is a change's own. `--hypothesis-profile default`
# draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The helpers' own asserts tell as much as a test's.
pytest.register_assert_rewrite(
    *("tests.corpus.stages", "tests.report.inspected", "tests.eval.evaluation"),
    *("tests.weights.conversion", "tests.weights.merging"),
)

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
SHIPPED = [DATA / name for name in ("dummy_en.json", "dummy_cn.json", "sharegpt_sample.json")]
TRAIN = "fastchat/train/train_lora.py"
# What a machine without a network has; a test that reached for a model hub would fail.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
TOKENS = tempfile.TemporaryDirectory(prefix="llama-lora-tokens-")  # until this process ends
OFFLINE["LLAMA_LORA_CACHE"] = TOKENS.name
# The same arithmetic on every CPU; tests of other dtypes set it themselves.
OFFLINE["LLAMA_LORA_DTYPE"] = "float32"
os.environ.update(OFFLINE)  # before torch is imported, for this process and those it starts


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_stays():
    """No collection of garbage searches again, in each training, what came before this module."""
    gc.collect()
    gc.freeze()


def run_script(*command, timeout: int = 300, **options) -> subprocess.CompletedProcess:
    """Run a script of this project by its path, with this Python; output is captured as text."""
    first, *rest = (str(part) for part in command)
    start = [sys.executable] if first.endswith(".py") else []
    return subprocess.run(
        [*start, first, *rest],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def run_here(script, *flags) -> subprocess.CompletedProcess:
    """Run a script as `run_script` does but in this process, which spares each run the imports."""
    words = [str(ROOT / script), *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)}
    out, err = Printed(), Printed()
    code, argv, sys.argv = 0, sys.argv, words
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.text, err.text)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line in which a script refused its input."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


class Printed(io.TextIOWrapper):
    """A stream in memory that takes what stdout does."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode()


def deepspeed(processes: int) -> list[str]:
    """The start of a `deepspeed` command, on a port that no other run on this machine has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, f"--num_gpus={processes}", f"--master_port={port}"]


def shipped(name: str) -> list[dict]:
    """The conversations of a file in data/."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    """A fast tokenizer from a SentencePiece model of Llama's kind, trained on the shipped data."""
    import sentencepiece

    from llama_lora.weights.llama_tokenizer import read_tokenizer_model

    texts = (
        line
        for name in ("dummy_en.json", "dummy_cn.json")
        for item in shipped(name)
        for turn in item["conversations"]
        for line in turn["value"].splitlines()
    )
    folder = tmp_path_factory.mktemp("llama-tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return read_tokenizer_model(folder / "tokenizer.model", scaled_rope=False).tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE tokenizer with ChatML's special tokens, of SmolLM2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        [turn["value"] for item in shipped("dummy_en.json") for turn in item["conversations"]],
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, llama_tokenizer) -> Path:
    """A model folder: a random Llama of 2 layers with grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=llama_tokenizer.bos_token_id,
        eos_token_id=llama_tokenizer.eos_token_id,
        pad_token_id=llama_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return folder


# Every flag of the README's command, with sizes for a tiny model.
README_FLAGS = shlex.split("""
--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --fp16 True --num_train_epochs 1
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
--evaluation_strategy no --save_strategy steps --save_steps 2 --save_total_limit 5
--learning_rate 2e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --model_max_length 256 --gradient_checkpointing True
""")
README_CORPUS = 48  # conversations, a multiple of the two launchers' batches


@pytest.fixture(scope="session")
def shipped_split(tmp_path_factory, tiny_base) -> Path:
    """The shipped data, through every stage of the corpus in its order; each accounts for all."""
    folder = tmp_path_factory.mktemp("stages")
    expected = sum(len(shipped(path.name)) for path in SHIPPED)
    sources = SHIPPED
    for script, *flags in (
        ("merge",),
        ("clean_sharegpt",),
        ("optional_clean", "--keep-lang", "en"),
        ("split_long_conversation", "--model-name", tiny_base, "--max-length", 256),
    ):
        out = folder / f"{script}.json"
        done = run_here(f"fastchat/data/{script}.py", "--in", *sources, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        numbers = r"^read ([\d,]+) · kept ([\d,]+).* · rejected ([\d,]+)"
        closing = re.findall(numbers, done.stdout, re.M)[-1]
        read, kept, rejected = (int(number.replace(",", "")) for number in closing)
        assert read == kept + rejected == expected
        sources, expected = [out], kept
    return out


@pytest.fixture(scope="session")
def readme_corpus(shipped_split, tmp_path_factory) -> Path:
    """The first conversations of it."""
    path = tmp_path_factory.mktemp("readme") / "split.json"
    path.write_text(json.dumps(json.loads(shipped_split.read_text())[:README_CORPUS]))
    return path


@pytest.fixture(scope="session")
def launched(tiny_base, readme_corpus, tmp_path_factory):
    """A training by `deepspeed` in two processes, as the README says: the run, and its folder.

    In the dtype that users of this machine get.
    """
    folder = tmp_path_factory.mktemp("launched")
    own = "--model_name_or_path", tiny_base, "--data_path", readme_corpus, "--output_dir", folder
    command = [*deepspeed(2), TRAIN, "--deepspeed", "./deepspeed-config.json", *own, *README_FLAGS]
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_LORA_DTYPE"}
    return run_script(*command, "--eval_ratio", 0.125, env=env), folder


@pytest.fixture(scope="module")
def random_base(tmp_path_factory, llama_tokenizer) -> Path:
    """A model folder whose weights are large enough for adapters and merges to tell."""
    from tests.weights.merging import make_base

    return make_base(tmp_path_factory.mktemp("merge") / "base", llama_tokenizer)


@pytest.fixture(scope="module")
def random_lora(tmp_path_factory, random_base) -> Path:
    from tests.weights.merging import make_adapter

    return make_adapter(tmp_path_factory.mktemp("merge") / "lora", random_base)


@pytest.fixture
def avx512_bf16(monkeypatch):
    """A CPU on which bitsandbytes packs 4-bit weights for its kernel, whatever this one is."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


@pytest.fixture(scope="session")
def spm(tmp_path_factory) -> Path:
    """A SentencePiece model of LLaMA's kind."""
    import sentencepiece

    from tests.weights.conversion import SENTENCES

    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiktoken_model(tmp_path_factory) -> Path:
    """A tiktoken vocabulary of Llama 3's kind: 344 tokens, and the 256 special ones."""
    from base64 import b64encode

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from tests.weights.conversion import SENTENCES, byte_of_letter

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trained.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=344,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    letters = byte_of_letter()
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [b64encode(bytes(letters[c] for c in token)) + b" %d" % rank for token, rank in tokens]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo's base model as it is downloaded; `make test-slow` puts it there."""
    path = ROOT / ".demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.is_file(), f"{path} is missing: run `make test-slow`"
    return path
