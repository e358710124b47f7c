"""Memory over many steps: no number of tokens that comes for the first time leaves more behind."""

import json
import os
import platform
import random
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llama_lora.train.compute import packed_attention
from llama_lora.train.memory import gradient_checkpointing, onednn_warmup
from tests.conftest import TRAIN, run_script, shipped
from tests.train.adapted import adapted_llama, batch, layers_of, trainable

STEPS = 300


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Conversations of which hardly two have as many tokens."""
    words = [word for item in shipped("dummy_en.json") for word in str(item).split()]
    draw = random.Random(0)
    items = []
    for number in range(STEPS):
        start, length = draw.randrange(1000), draw.randrange(5, 130)
        turns = [("human", "Go on."), ("gpt", " ".join(words[start : start + length]))]
        turns = [{"from": who, "value": text} for who, text in turns]
        items.append({"id": f"unlike-{number}", "conversations": turns})
    path = tmp_path_factory.mktemp("unlike") / "split.json"
    path.write_text(json.dumps(items))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_300_unlike_micro_batches_take_no_more_than_100(dtype, tiny_base, unlike, tmp_path):
    """The largest is the first; each is an example by itself."""
    own = ["--model_name_or_path", tiny_base, "--data_path", unlike, "--output_dir", tmp_path]
    done = run_script(
        *(TRAIN, *own, "--model_max_length", 512, "--per_device_train_batch_size", 1),
        *("--packing", "False", "--max_steps", STEPS, "--logging_steps", 1),
        *("--gradient_checkpointing", "False", "--save_strategy", "no"),
        timeout=1200,
        env={**os.environ, "LLAMA_LORA_DTYPE": dtype},
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "trainer_log.jsonl").read_text().splitlines()
    peaks = [json.loads(line)["peak_memory_bytes"] for line in lines]
    assert len(peaks) == STEPS
    assert peaks[-1] <= 1.05 * peaks[99]
    assert peaks[-1] <= 1.3 * peaks[0]


def test_lengths_in_steps_change_no_result():
    """In 16 bits on a CPU attention fills examples up, and nothing of that shows."""
    torch.manual_seed(0)
    lengths = [5, 64, 33]
    given = [torch.randn(1, heads, sum(lengths), 16, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    ours = [one.clone().requires_grad_() for one in given]
    exact = [one.float().requires_grad_() for one in given]
    found, _ = packed_attention.attend_within_examples(None, *ours, None, example_lengths=lengths)
    alone = [
        scaled_dot_product_attention(*example, is_causal=True, enable_gqa=True)
        for example in zip(*(whole.split(lengths, 2) for whole in exact), strict=True)
    ]
    expected = torch.cat(alone, 2).transpose(1, 2)
    upstream = torch.randn_like(found)
    results = found, *torch.autograd.grad(found, ours, upstream)
    references = expected, *torch.autograd.grad(expected, exact, upstream.float())
    for result, reference in zip(results, references, strict=True):
        torch.testing.assert_close(result.float(), reference, rtol=0.02, atol=0.02)


def test_a_rehearsal_changes_no_bit(tmp_path):
    """Dropout draws the same numbers, and afterwards all layers are there."""
    model = adapted_llama(tmp_path, dtype=torch.bfloat16, dropout=0.1)
    seen = []

    def loss_of(part):
        seen.append(len(layers_of(model)))
        return model(**part).loss

    def gradients(function):
        torch.manual_seed(1)
        return torch.autograd.grad(function(batch(50)), trainable(model))

    expected = gradients(loss_of)
    found = gradients(onednn_warmup.before(loss_of, model))
    assert seen == [2, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_needs_no_rehearsal_has_none(tmp_path):
    def loss_of(part):
        raise AssertionError

    plain = adapted_llama(tmp_path / "fp32")
    assert onednn_warmup.before(loss_of, plain) is loss_of
    recomputing = adapted_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    gradient_checkpointing.checkpoint(recomputing.get_base_model(), layers_of(recomputing))
    assert onednn_warmup.before(loss_of, recomputing) is loss_of


MAPPED = """
import ctypes, torch
from llama_lora.train.memory import allocator

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap

def mapped():  # whether a large block comes straight from the system, not from the heap
    before = libc.mallinfo2().hblkhd
    held = torch.empty(2 * allocator.LARGE, dtype=torch.uint8)
    return libc.mallinfo2().hblkhd - before >= held.nbytes

with allocator.large_blocks_given_back():
    print(mapped())
print(mapped())
allocator.give_back_large_blocks()
with allocator.large_blocks_given_back():
    print(mapped())
print(mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
def test_large_blocks_are_outside_the_heap_while_they_are_given_back():
    """In a process of its own, whose heap has no room for them yet."""
    assert printed(MAPPED).split() == ["True", "False", "True", "True"]


@pytest.mark.parametrize("asked", [None, "7"])
def test_few_compiled_products_are_kept_unless_asked(asked):
    given = {"LRU_CACHE_CAPACITY": asked} if asked else {}
    cleared = {key: value for key, value in os.environ.items() if "CACHE_CAPACITY" not in key}
    code = "import os, llama_lora; print(os.environ['LRU_CACHE_CAPACITY'])"
    assert printed(code, env=cleared | given) == (asked or "128")


def test_the_peak_is_that_of_the_process_alone():
    """A process begins with what the one that started it held, to `getrusage`."""
    ballast = bytearray(1 << 30)
    code = "from llama_lora.train.memory.peak import peak_memory; print(peak_memory())"
    assert 10 << 20 < int(printed(code)) < len(ballast)


def printed(code: str, **options) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, **options
    ).stdout.strip()
