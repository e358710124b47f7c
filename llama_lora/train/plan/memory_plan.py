"""Will it fit? The memory that a training needs, estimated from the base's config and the flags.

What the layers keep comes from `activation_memory`, which is checked against measurements;
everything else is here. Nothing is loaded, so the answer takes seconds, and the card may be
elsewhere.
"""

from dataclasses import dataclass

from llama_lora.hardware.cards import GIB
from llama_lora.model.folder.shape import Shape
from llama_lora.train.compute import chunked_loss, dropout
from llama_lora.train.compute.attention_kernels import LOOP
from llama_lora.train.memory import allocator, gradient_checkpointing
from llama_lora.train.plan import activation_memory
from llama_lora.train.plan.activation_memory import FP32, Attention, Layer
from llama_lora.train.plan.zero_memory import Zero

# What CUDA takes, unseen by torch: assumed, not measured. A fifth of a GiB is there from the start;
# kernels, and what cuBLAS and NCCL allocate, come later.
CUDA_AT_START = 0.2 * GIB
CUDA_CONTEXT = CUDA_AT_START + 0.25 * GIB
COMFORTABLE = 0.9  # share of the memory that a plan chosen here uses at most
FRAGMENTATION = 0.04  # of what comes and goes
PRODUCTS = 0.1 * GIB  # in 16 bits on a CPU: what oneDNN compiles and keeps, measured
IN_FLIGHT = 3  # layers whose inputs are on the card while the others' wait on the host


@dataclass(frozen=True)
class Setup:
    """Everything that decides how much memory a training process takes.

    Attributes:
        quantization: of the base: "8bit", "4bit" or "none".
        itemsize: bytes per element in the compute dtype.
        targets: the adapted linear layers of a decoder layer, each with its outputs and inputs.
        tokens: in the fullest micro-batch; `parts` of about the same size are computed in turn.
        longest: tokens in the longest example, which parts do not split.
        attention: the kernel, see `attention_kernels.kernel_for`.
        log_sums, sum_rows: what it allocates for a micro-batch, at most, see there; 0: one for each
            token.
        recompute: "True" for all layers, "False" for none, "auto" for as few as needed.
        offload: whether the inputs of recomputed layers wait in the host's memory.
        mlp_tiles: how many tiles a recomputed layer's MLP is computed in, or "auto".
        on_card: whether the memory is a card's.
        base_load: bytes that the process takes before anything is loaded.
        zero: DeepSpeed's engine, or None.
    """

    shape: Shape
    quantization: str
    itemsize: int
    targets: dict[str, tuple[int, int]]
    lora_r: int
    lora_dropout: float
    use_dora: bool
    optim: str
    tokens: int
    longest: int
    attention: str = LOOP
    log_sums: int = 0
    sum_rows: int = 0
    parts: int = 1
    recompute: str = "auto"
    offload: bool = False
    mlp_tiles: str = "auto"
    on_card: bool = True
    base_load: float = CUDA_CONTEXT
    zero: Zero | None = None

    @property
    def part_tokens(self) -> int:
        """Tokens of the fullest part; whole examples may make it half an example longer."""
        if self.parts == 1:
            return self.tokens
        about = -(-self.tokens // self.parts) + self.longest // 2
        return min(self.tokens, max(self.longest, about))

    @property
    def attends(self) -> Attention:
        """How attention is computed in the part that has most to hold for it."""
        of_part = self.parts * self.part_tokens
        log_sums, rows = (max(1, most / of_part) for most in (self.log_sums, self.sum_rows))
        return Attention(self.attention, log_sums, rows)

    @property
    def tiles(self) -> int:
        """How many tiles the MLP of a recomputed layer is computed in."""
        auto = self.mlp_tiles == "auto"
        return -(-self.part_tokens // gradient_checkpointing.TILE) if auto else int(self.mlp_tiles)

    @property
    def lora_parameters(self) -> int:
        return self.shape.lora_parameters(self.targets, self.lora_r, self.use_dora)


@dataclass(frozen=True)
class Plan:
    """Where the memory goes: bytes by use, out of `available` bytes.

    `recomputed` is the number of layers that recompute their activations.
    """

    setup: Setup
    available: float
    recomputed: int
    bytes_by_use: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.bytes_by_use.values())

    @property
    def share(self) -> float:
        """The share of the layers that recompute."""
        return self.recomputed / self.setup.shape.layers

    @property
    def spare(self) -> float:
        """Bytes left; negative if it does not fit."""
        return self.available - self.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def comfortable(self) -> bool:
        """Whether it fits even if the estimate is somewhat off."""
        return self.total <= COMFORTABLE * self.available


def plan(setup: Setup, available: float) -> Plan:
    """The plan with as few recomputed layers as fit comfortably, or as many as `setup` asks for."""
    layers = setup.shape.layers
    counts = {"True": [layers], "False": [0], "auto": range(layers + 1)}[setup.recompute]
    plans = (Plan(setup, available, count, memory(setup, count)) for count in counts)
    for found in plans:
        if found.comfortable:
            break
    return found


def memory(setup: Setup, recomputed: int) -> dict[str, float]:
    """Bytes by use, while a micro-batch is computed with `recomputed` layers recomputing."""
    shape, itemsize = setup.shape, setup.itemsize
    activations = activation_bytes(setup, recomputed)
    losses = chunked_loss.CHUNK_BYTES * (
        2 + itemsize / FP32
    )  # logits, and what is computed from them
    unfolded = activation_memory.dequantized_bytes(shape.config, setup.quantization, itemsize)
    workspace = 2 * unfolded + fragmentation(setup, recomputed) * (activations + losses)
    if not setup.on_card and itemsize < FP32:
        workspace += PRODUCTS
    if setup.use_dora:
        workspace += activation_memory.dora_workspace(setup.targets)
    if setup.zero:
        passing = activations + losses + workspace
        workspace += max(0, setup.zero.in_a_step(setup.lora_parameters) - passing)
    matrices = setup.zero.matrices if setup.zero else FP32
    return {
        "process": setup.base_load,
        "weights": shape.weight_bytes(setup.quantization, itemsize),
        "LoRA matrices": matrices * setup.lora_parameters,
        "gradients": gradient_bytes(setup.zero) * setup.lora_parameters,
        "optimizer": optimizer_bytes(setup.optim, setup.zero) * setup.lora_parameters,
        "activations": activations,
        "loss": losses,
        "workspace": workspace,
    }


def fragmentation(setup: Setup, recomputed: int) -> float:
    """How much memory is held without use, as a share of the memory that comes and goes.

    If layers recompute on a CPU, the heap gives large blocks back, see `allocator`.
    """
    return FRAGMENTATION if setup.on_card or recomputed else allocator.HOLES[setup.itemsize]


def activation_bytes(setup: Setup, recomputed: int) -> float:
    """What waits for the backward pass, and what the layer at work takes by itself."""
    config, size = setup.shape.config, setup.itemsize
    settings = setup.lora_r, size, setup.lora_dropout, setup.on_card, setup.attends, setup.use_dora
    layer = Layer.of(config, tuple(setup.targets), *settings)
    kept, peak = layer.kept(), layer.peak(setup.tiles if recomputed else 1)
    fixed = 0  # whatever the tokens
    if setup.use_dora:
        scaled = activation_memory.dora_per_token(setup.targets, size)
        kept, peak = kept + scaled, peak + scaled
        of_layer = setup.targets, setup.quantization, size, setup.lora_dropout
        fixed = activation_memory.dora_weights(*of_layer) * max(setup.shape.layers - recomputed, 1)
    waiting = min(recomputed, IN_FLIGHT) if setup.offload else recomputed
    whole = setup.shape.layers - recomputed
    at_work = peak if recomputed else max(0, peak - kept)  # what is kept is already counted
    held = whole * kept + waiting * activation_memory.checkpoint_per_token(config, size)
    if setup.lora_dropout and not setup.use_dora:
        fixed = dropout.BYTES
        masks = activation_memory.masks_per_token(tuple(setup.targets), setup.lora_dropout)
        held += setup.shape.layers * masks
    at_the_loss = activation_memory.ends_per_token(config, size)
    in_a_layer = activation_memory.beside_layers_per_token(config, size) + at_work
    return setup.part_tokens * (held + max(at_the_loss, in_a_layer)) + fixed


def gradient_bytes(zero: Zero | None) -> float:
    """Bytes of gradients per trained parameter: computed apart from those that are applied."""
    return zero.gradients if zero else 2 * FP32


def optimizer_bytes(optim: str, zero: Zero | None = None) -> float:
    """Bytes that an optimizer, by its name in `--optim`, keeps per trained parameter."""
    other = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4}
    states = 2 if "8bit" in optim else other.get(optim, 8)
    return zero.optimizer(states) if zero else states
