"""What transformers 4 and peft 0.13 make of folders: run by the Python of that environment.

Reads from stdin `{"folders": […], "messages": […], "template": …, "new_tokens": …}` and writes, for
each folder, what it found for each conversation. The template is for tokenizers without one.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(asked: dict) -> list[list[dict]]:
    return [answers(Path(folder), asked) for folder in asked["folders"]]


def answers(folder: Path, asked: dict) -> list[dict]:
    adapter = (folder / "adapter_config.json").is_file()
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template or asked["template"]
    found = []
    for messages in asked["messages"]:
        prompt = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            logits = model(**prompt).logits[0, -1]
            ids = model.generate(**prompt, max_new_tokens=asked["new_tokens"], do_sample=False)
        length = prompt["input_ids"].shape[1]
        answer = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        found.append(
            {
                "prompt": prompt["input_ids"][0].tolist(),
                "logits": logits.tolist(),
                "answer": answer,
            }
        )
    return found


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
