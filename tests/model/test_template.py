"""The prompt is fschat's character for character, and exactly the answers are labelled."""

import pytest
from fastchat.conversation import get_conv_template
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from tests.conftest import shipped


def turns(*values: str, system: str | None = None) -> list[dict]:
    first = [{"from": "system", "value": system}] if system is not None else []
    roles = ["human", "gpt"] * len(values)
    return first + [{"from": r, "value": v} for r, v in zip(roles, values, strict=False)]


def fschat_prompt(conversation: list[dict], generation: bool = False) -> str:
    conv = get_conv_template("vicuna_v1.1")
    for turn in conversation:
        if turn["from"] == "system":
            conv.set_system_message(turn["value"])
        else:
            conv.append_message(conv.roles[turn["from"] == "gpt"], turn["value"])
    if generation:
        conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def labelled_runs(encoded) -> list[list[int]]:
    """The stretches of labelled ids, each of which is one answer."""
    runs, before = [], IGNORE
    for label in encoded.labels:
        if label != IGNORE:
            runs = runs if before != IGNORE else [*runs, []]
            runs[-1].append(label)
        before = label
    return runs


RAW_VALUES = [
    [turn["value"] for turn in item["conversations"]]
    for item in shipped("sharegpt_sample.json")
    if len(item["conversations"]) % 2 == 0 and all(turn["value"] for turn in item["conversations"])
]
SAMPLES = [item["conversations"] for item in shipped("dummy_en.json") + shipped("dummy_cn.json")]


def test_vicuna_template_is_fschats(llama_tokenizer):
    template = Template(llama_tokenizer)
    sound = [turns(*values) for values in RAW_VALUES if values]
    for sample in SAMPLES + sound:
        assert template.render(sample)[0] == "<s>" + fschat_prompt(sample)
        assert template.prompt(sample[:-1]) == "<s>" + fschat_prompt(sample[:-1], generation=True)


# fschat leaves the colon's space out of an empty turn, which no corpus file can hold.
text = st.text(min_size=1, max_size=40)


@given(st.lists(text, min_size=1, max_size=6), st.none() | text)
def test_vicuna_template_is_fschats_for_any_text(llama_tokenizer, values, system):
    sample, template = turns(*values, system=system), Template(llama_tokenizer)
    assert template.render(sample)[0] == template.text(sample) == "<s>" + fschat_prompt(sample)


@pytest.mark.parametrize("fixture", ["llama_tokenizer", "byte_tokenizer"])
def test_exactly_the_answers_and_their_ends_are_labelled(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    template = Template(tokenizer)
    for sample in SAMPLES:
        encoded = template.encode(sample)
        answers = [turn["value"] for turn in sample if turn["from"] == "gpt"]
        learned = [tokenizer.decode(run) for run in labelled_runs(encoded)]
        assert [text.strip() for text in learned] == [a + tokenizer.eos_token for a in answers]
        assert all(label in (IGNORE, id) for id, label in zip(*astuple(encoded), strict=True))


def astuple(encoded):
    return encoded.ids, encoded.labels


@given(st.lists(st.text(max_size=30), min_size=2, max_size=6))
def test_byte_level_labels_are_right_by_construction(byte_tokenizer, values):
    """Every byte of every answer is labelled once, whatever the text, and nothing before it."""
    sample = turns(*values)
    template = Template(byte_tokenizer)
    encoded = template.encode(sample)
    assert byte_tokenizer.decode(encoded.ids) == template.render(sample)[0]
    expected = "".join(
        " " + turn["value"] + "<|im_end|>" for turn in sample if turn["from"] == "gpt"
    )
    assert byte_tokenizer.decode(_labelled(encoded)) == expected


def _labelled(encoded):
    return [label for label in encoded.labels if label != IGNORE]


def test_special_tokens_within_the_text(llama_tokenizer):
    encoded = Template(llama_tokenizer).encode(turns("what is </s> ?", "it ends: </s> and <unk>"))
    assert encoded.ids.count(llama_tokenizer.eos_token_id) == 3
    assert _labelled(encoded).count(llama_tokenizer.eos_token_id) == 2
    assert llama_tokenizer.unk_token_id in _labelled(encoded)


def test_chatml_learns_the_end_token_and_not_the_line_break_after_it(byte_tokenizer):
    template = Template(byte_tokenizer, "model")
    encoded = template.encode(turns("Hi", "Hello", "Who?", "Kestrel"))
    runs = [byte_tokenizer.decode(run) for run in labelled_runs(encoded)]
    assert runs == ["Hello<|im_end|>", "Kestrel<|im_end|>"]
    assert template.stop_ids == [byte_tokenizer.eos_token_id]


def test_label_from_leaves_the_context_unlabelled(byte_tokenizer):
    sample = turns("Count", "one two", "More", "three four five")
    encoded = Template(byte_tokenizer).encode(sample, label_from=len("three four"))
    runs = [byte_tokenizer.decode(run) for run in labelled_runs(encoded)]
    assert runs == [" one two<|im_end|>", " five<|im_end|>"]


def test_the_end_of_an_unfinished_answer_is_not_labelled(byte_tokenizer):
    encoded = Template(byte_tokenizer).encode(turns("Count", "one two"), unfinished=True)
    assert [byte_tokenizer.decode(run) for run in labelled_runs(encoded)] == [" one two"]


def test_a_template_that_never_ends_an_answer_is_refused(byte_tokenizer):
    template = Template(byte_tokenizer, "model")
    template.jinja = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(InputError, match="never stop"):
        template.encode(turns("Hi", "Hello"))


def test_a_template_that_changes_earlier_turns_is_refused(byte_tokenizer):
    template = Template(byte_tokenizer, "model")
    template.jinja = "{{ messages | length }}" + template.jinja
    with pytest.raises(InputError, match="differently once later turns follow"):
        template.encode(turns("Hi", "Hello", "And?", "So"))


def test_other_readers_prompt_as_trained(llama_tokenizer, tmp_path):
    """transformers alone, from the saved folder, gives the prompt that training used."""
    sample = SAMPLES[0]
    template = Template(llama_tokenizer)
    template.tokenizer.save_pretrained(tmp_path)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": sample[0]["value"]}]
    ids = reader.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == template.prompt_ids(sample[:1])
    assert template.encode(sample[:2]).ids[: len(ids)] == ids
    assert Template(load_tokenizer(tmp_path), "model").encode(sample) == template.encode(sample)


def test_padding_is_never_the_end_of_an_answer(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "<|im_end|>"')
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
