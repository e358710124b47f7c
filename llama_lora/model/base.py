"""Load a base model in 16 (or 32), 8 or 4 bits."""

from pathlib import Path

from llama_lora.cli import InputError, out_of_memory
from llama_lora.hardware.device import compute_dtype, dtype_name, present
from llama_lora.model.folder import quantized_weights
from llama_lora.model.folder.config import load_config
from llama_lora.text import named


def load_base(folder, quantization: str = "none", dtype=None, device=None):
    """Load a Llama-architecture base for inference or LoRA training.

    Args:
        folder: a Hugging Face model folder.
        quantization: "8bit" (see `int8_linear`), "4bit" (NF4 with double quantization, Dettmers et
            al. 2023) or "none"; norms, embeddings and head in `dtype`. A folder with quantized
            weights is loaded as it is.
        dtype: of activations and unquantized weights; default: `compute_dtype()`.
        device: default: the current CUDA device, else the CPU.

    Raises:
        InputError: the folder holds no model, or its weights do not match its config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from llama_lora.model import grouped_query_attention, int8_linear

    config = load_config(folder)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for nearly every new length
    # A product that is cut up adds its parts in fp32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dtype = dtype or compute_dtype()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stored = getattr(config, "quantization_config", None)
    if stored:
        quantization = "none"  # by us
        stored["bnb_4bit_compute_dtype"] = dtype_name(dtype)
    try:
        with int8_linear.quantized_alike():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                quantization_config=_quantization_config(quantization, dtype),
                device_map={"": device},
                attn_implementation=grouped_query_attention.implementation(present()),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # replaced by a line of ours
            )
    except (OSError, SafetensorError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{folder}: this model cannot be loaded: {error}") from error
    found["mismatched_keys"] |= quantized_weights.misshapen(model)
    check_complete(Path(folder), model, **found)
    if stored:
        _compute_in(model, dtype)
    keep_nf4_layout(model)
    int8_linear.use_in(model)
    return model


def _compute_in(model, dtype) -> None:
    """Cast what is not quantized in `model` to `dtype`, and have weights dequantized to it too.

    transformers leaves both as they were when the folder was written.
    """
    from bitsandbytes.nn import Params4bit

    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def check_complete(
    folder: Path, model, missing_keys, mismatched_keys, unexpected_keys, **others
) -> None:
    """Compare the tensors of `folder` with those that its config asks for.

    Missing tensors would be random numbers. Tensors inside the language model that the config has
    no place for mean another model, with more layers or with biases. Other parts, such as a vision
    tower or a reward head, do no harm.

    Args:
        model: may be on the meta device.
        missing_keys, mismatched_keys, unexpected_keys: names as transformers reports them; the
            mismatched ones with the stored and the expected shape.

    Raises:
        InputError: they differ; names the tensors.
    """
    if missing_keys:
        raise InputError(f"{folder}: expected {named(missing_keys)}, found none")
    for name, found, expected in sorted(mismatched_keys):
        expected, found = tuple(expected), tuple(found)
        raise InputError(f"{folder}: expected {name} of shape {expected}, found {found}")
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in (*model.named_children(), *model.base_model.named_children())}
    inside = [
        name
        for name in unexpected_keys
        if name.removeprefix(prefix).partition(".")[0] in modules - {model.base_model_prefix}
    ]
    if inside:
        raise InputError(
            f"{folder}: found {named(inside)}, for which the model in its config.json has no place"
        )


def keep_nf4_layout(model) -> None:
    """Keep the weights of 4-bit layers in their quantized layout on every CPU.

    With AVX512-BF16, bitsandbytes packs them at the first forward pass in `eval()`, for a kernel
    without a backward pass, and never unpacks them. Training would then continue with wrong
    gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization_config(quantization: str, dtype):
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None
