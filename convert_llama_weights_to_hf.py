"""Turn Meta's Llama weights, or a GGUF file, into a Hugging Face folder.

python3 convert_llama_weights_to_hf.py --input_dir ./pyllama_data --model_size 7B \\
    --output_dir ./pyllama_data/output/7B
python3 convert_llama_weights_to_hf.py --gguf model.gguf --output_dir ./base
"""

import argparse
import time
from pathlib import Path

from llama_lora.cli import one_line_errors
from llama_lora.options import Help, file_size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input_dir",
        type=Path,
        help="folder of Meta's checkpoint, with tokenizer.model; params.json and "
        "consolidated.NN.pth are in it or in the subfolder that --model_size names",
    )
    source.add_argument("--gguf", type=Path, metavar="FILE", help="GGUF file of a Llama model")
    parser.add_argument("--model_size", help="subfolder of --input_dir, such as 7B")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to write; it appears once complete"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float16", "bfloat16", "float32"],
        default="auto",
        help="dtype of the written weights; auto keeps 16-bit weights as they are and writes "
        "float32 and quantized ones as float16",
    )
    parser.add_argument(
        "--max_shard_size",
        type=file_size,
        default="2GB",
        help="largest size of one weights file; about as much memory is needed",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model in --output_dir"
    )
    args = parser.parse_args()
    if args.model_size and args.gguf:
        parser.error("argument --model_size: not allowed with argument --gguf")
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    import torch

    from llama_lora.weights.gguf_reader import open_gguf
    from llama_lora.weights.hf_writer import check_target, dtype_name, write_folder
    from llama_lora.weights.meta_checkpoint import open_meta_checkpoint

    started = time.monotonic()
    check_target(args.output_dir, args.overwrite)
    if args.gguf:
        checkpoint = open_gguf(args.gguf)
    else:
        checkpoint = open_meta_checkpoint(args.input_dir, args.model_size)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    written = write_folder(checkpoint, args.output_dir, dtype, args.max_shard_size, args.overwrite)
    tokenizer = checkpoint.tokenizer
    print(
        f"wrote {args.output_dir}: {written.parameters / 1e6:,.1f} M parameters in "
        f"{dtype_name(written.dtype)}, {written.bytes / 1e9:.2f} GB in {written.files} file(s), "
        f"context {checkpoint.config.max_position_embeddings:,}, bos {tokenizer.bos_token}, "
        f"eos {tokenizer.eos_token}, pad {tokenizer.pad_token}, "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main(parse_args())
