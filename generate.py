"""Chat with a base model and its LoRA adapter, or with the base alone.

python3 generate.py --base_model ./pyllama_data/output/7B --lora_weights ./output
python3 generate.py --base_model ./pyllama_data/output/7B --lora_weights ./output \\
    --prompt "Who are you?" --temperature 0
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

from llama_lora.cli import one_line_errors
from llama_lora.model.console import COMMANDS, answer, converse
from llama_lora.model.hardware import QUANTIZATIONS

TEMPLATE_HELP = "auto: the adapter's, else the base's own, else vicuna_v1.1"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=COMMANDS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base_model", type=Path, required=True, help="Hugging Face model folder")
    add("--lora_weights", type=Path, help="adapter folder; without it the base answers alone")
    add("--prompt", help="print the answer to this question, nothing else, and end")
    add("--system", help="system message; default: the template's own")
    add("--template", choices=["auto", "vicuna_v1.1", "model"], default="auto", help=TEMPLATE_HELP)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="of the base's weights"
    )
    for bits in ("8bit", "4bit"):
        help = f"same as --quantization {bits}"
        precision.add_argument(
            f"--load_{bits}", type=flag, nargs="?", const=True, default=False, help=help
        )
    number = between(0, 100)
    add("--temperature", type=number, default=0.7, help="0: always the likeliest token")
    number = between(0, 1, above=True)
    add("--top_p", type=number, default=0.9, help="cut off all but this probability; 1: off")
    number = between(0, kind=int)
    add("--top_k", type=number, default=0, help="cut off all but this many tokens; 0: off")
    number = between(0, 100, above=True)
    add("--repetition_penalty", type=number, default=1.0, help="above 1: repeats itself less")
    number = between(1, kind=int)
    add("--max_new_tokens", type=number, default=512, help="longest answer, in tokens")
    number = between(0, 2**64 - 1, kind=int)
    add("--seed", type=number, help="makes the sampling repeatable")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        parser.error("argument --prompt: expected a question, found nothing")
    if args.load_8bit or args.load_4bit:
        args.quantization = "8bit" if args.load_8bit else "4bit"
    return args


def between(low, high=math.inf, kind=float, above=False):
    """An argparse type: numbers from `low` (or only above it) to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or above and value == low:
            limits = f"{'above' if above else 'at least'} {low}"
            limits += f", at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number {limits}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid float value"
    return parse


def flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() == "true"


@one_line_errors
def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from llama_lora.model.chat import Chat, Sampling, load

    sys.stdout.reconfigure(errors="replace")
    warnings.simplefilter("ignore")  # the libraries' are for developers
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model, template, summary = load(
        args.base_model, args.lora_weights, args.quantization, args.template
    )
    print(summary, file=sys.stderr)
    sampling = {field: getattr(args, field) for field in Sampling.__dataclass_fields__}
    chat = Chat(model, template, Sampling(**sampling), args.system)
    if args.prompt is not None:
        answer(chat, args.prompt)
    else:
        converse(chat)


if __name__ == "__main__":
    main(parse_args())
