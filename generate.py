"""Chat with a base model and its LoRA adapters, or with the base alone; answer a file of prompts.

python3 generate.py --base_model ./base --lora_weights ./output
python3 generate.py --base_model ./base --lora_weights ./output --prompt "Who are you?"
python3 generate.py --base_model ./base --lora_weights ./output \\
    --prompts_file questions.jsonl --output_file answers.jsonl
python3 generate.py --base_model ./base --lora_weights ./output --web
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

from llama_lora.chat.console import COMMANDS, Console, show
from llama_lora.cli import one_line_errors
from llama_lora.hardware.device import QUANTIZATIONS
from llama_lora.options import Help, batch_size, between, flag

PROMPTS_HELP = (
    "answer a file of prompts: conversations that end with a question, FastChat's question files, "
    'or objects with "prompt", "question" or "text"'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=COMMANDS, formatter_class=Help)
    add = parser.add_argument
    add("--base_model", type=Path, required=True, help="folder of the base model (Hugging Face)")
    help = "adapter folders, FOLDER or NAME=FOLDER; the first is used; default: the base alone"
    add("--lora_weights", nargs="+", default=[], metavar="FOLDER", help=help)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="answer this question, print nothing else, and exit")
    what.add_argument("--prompts_file", metavar="FILE", help=PROMPTS_HELP)
    what.add_argument("--web", action="store_true", help="chat in the browser")
    add("--output_file", metavar="FILE", help="corpus file for the answers to --prompts_file")
    help = "prompts answered at a time; default: as many as fit in memory"
    add("--batch_size", type=batch_size, metavar="auto|N", help=help)
    help = "address that --web listens on; whoever can reach it can use the model"
    add("--host", default="127.0.0.1", help=help)
    add("--port", type=between(1, 65535, int), default=7860, help="port that --web listens on")
    add("--system", help="system message; default: the template's own")
    help = "prompt template; auto: the adapter's, else the base's own, else vicuna_v1.1"
    add("--template", choices=["auto", "vicuna_v1.1", "model"], default="auto", help=help)
    precision = parser.add_mutually_exclusive_group()
    help = "precision of the base's weights; auto: 8bit"
    precision.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help=help)
    for bits in ("8bit", "4bit"):
        more = {"type": flag, "nargs": "?", "const": True, "default": False}
        precision.add_argument(f"--load_{bits}", **more, help=f"--quantization {bits}")
    number = between(0, 100)
    add("--temperature", type=number, default=0.7, help="0: always take the likeliest token")
    number = between(0, 1, above=True)
    help = "sample from the likeliest tokens that together have this probability; 1: off"
    add("--top_p", type=number, default=0.9, help=help)
    number = between(0, kind=int)
    help = "sample from this many of the likeliest tokens; 0: off"
    add("--top_k", type=number, default=0, help=help)
    number = between(0, 100, above=True)
    add("--repetition_penalty", type=number, default=1.0, help="above 1: less repetition")
    number = between(1, kind=int)
    add("--max_new_tokens", type=number, default=512, help="longest answer, in tokens")
    number = between(0, 2**64 - 1, kind=int)
    add("--seed", type=number, help="make sampling repeatable")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        parser.error("argument --prompt: expected a question, found none")
    if bool(args.prompts_file) != bool(args.output_file):
        parser.error("--prompts_file and --output_file: expected both or neither")
    if args.prompts_file and len(args.lora_weights) > 1:
        parser.error("argument --lora_weights: expected one adapter with --prompts_file")
    if args.load_8bit or args.load_4bit:
        args.quantization = "8bit" if args.load_8bit else "4bit"
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    sys.stdout.reconfigure(errors="replace")
    if args.prompts_file:
        from llama_lora.chat.answer_file import answer_questions

        print(answer_questions(args, loaded))
    elif args.web:
        from llama_lora.chat.web import serve

        serve(args, loaded)
    else:
        chat(args)


def chat(args: argparse.Namespace) -> None:
    from llama_lora.chat.answer_file import save_conversation
    from llama_lora.chat.sampling import Sampling
    from llama_lora.chat.session import Chat

    adapters = loaded(args)
    chat = Chat(adapters.model, adapters.first, Sampling.of(args), args.system)
    if args.prompt is not None:
        show(chat, chat.stream(args.prompt))
    else:
        Console(chat, adapters, partial(save_conversation, mine=set())).run()


def loaded(args: argparse.Namespace):
    """The base and its adapters; a line that describes them goes to stderr."""
    from transformers.utils import logging

    from llama_lora.chat.adapters import load_adapters, named_folders

    warnings.simplefilter("ignore")  # the libraries' are for developers
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folders = named_folders(args.lora_weights)
    adapters, summary = load_adapters(args.base_model, folders, args.quantization, args.template)
    print(summary, file=sys.stderr)
    return adapters


if __name__ == "__main__":
    main(parse_args())
