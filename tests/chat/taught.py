"""Tiny models that are trained in seconds until they know a few answers by heart.

So their answers end by themselves and hold characters of several tokens.
"""

import functools
import json

import torch
from fastchat.conversation import get_conv_template
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama_lora.chat.sampling import Sampling
from tests.conftest import ROOT, run_here

SCRIPT = ROOT / "generate.py"
generate = functools.partial(run_here, SCRIPT)
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
SECOND_ANSWERS = dict(zip(BASE_ANSWERS, [_others[-1], _first, _others[0]], strict=True))
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


def fed(model) -> list[list[int]]:
    """The ids of every later pass through the model."""
    passes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0][0].tolist())
    )
    return passes
