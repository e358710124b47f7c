"""Compare an adapter with its base: held-out loss, and answers side by side, on one HTML page.

python3 fastchat/eval/evaluate.py --base_model ./base --lora_weights ./output \\
    --data_path heldout.json --questions data/questions.jsonl
"""

import argparse
import sys
import warnings
from pathlib import Path

from llama_lora.cli import one_line_errors
from llama_lora.hardware.device import QUANTIZATIONS
from llama_lora.options import Help, batch_size, between


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--base_model", type=Path, required=True, help="folder of the base model (Hugging Face)")
    add("--lora_weights", type=Path, help="adapter folder; without it the base is measured alone")
    add("--data_path", type=Path, help="corpus file of conversations that training has not seen")
    add(
        "--eval_ratio",
        type=between(0, 0.5, above=True),
        metavar="SHARE",
        help="measure only on the share of --data_path that train_lora.py --eval_ratio held out; "
        "--seed and --max_length must equal its --seed and --model_max_length",
    )
    add("--questions", type=Path, help="file of questions to answer, in FastChat's format")
    add(
        "--output_dir",
        type=Path,
        help="folder for evaluation.html and .json; default: the adapter's",
    )
    help = "precision of the base's weights; auto: 8bit"
    add("--quantization", choices=QUANTIZATIONS, default="none", help=help)
    count = between(1, kind=int)
    add("--max_length", type=count, default=2048, help="tokens read of each conversation")
    add("--max_new_tokens", type=count, default=256, help="longest answer, in tokens")
    help = "questions answered at a time; default: as many as fit in memory"
    add("--batch_size", type=batch_size, metavar="auto|N", help=help)
    help = "measure at most this many conversations and questions, chosen at random"
    add("--limit", type=count, help=help)
    seed = between(0, 2**32 - 1, kind=int)
    add("--seed", type=seed, default=42, help="seed of --eval_ratio, --limit and the intervals")
    args = parser.parse_args()
    if not (args.data_path or args.questions):
        parser.error("nothing to measure: give --data_path, --questions, or both")
    args.output_dir = args.output_dir or args.lora_weights or Path()
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from llama_lora.corpus.engine.stage import stop_on_sigterm
    from llama_lora.eval import evaluation, html_page

    stop_on_sigterm()
    warnings.simplefilter("ignore")  # the libraries' are for developers
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with html_page.opened(args.output_dir, evaluation.settings_of(args)) as (kept, write):
        found = evaluation.run(args, kept)
        write(found)
    print(evaluation.summary(found))
    print(f"\n{args.output_dir / html_page.HTML}\n{args.output_dir / html_page.JSON}")


if __name__ == "__main__":
    main(parse_args())
