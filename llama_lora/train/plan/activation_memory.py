"""Bytes of activations in LoRA training of a Llama, from its config alone.

What transformers, peft and bitsandbytes keep for the backward pass, and what else they hold, was
read in their sources; tests compare it with what torch really holds. All figures are per token of a
micro-batch; what does not grow with the tokens has functions of its own.
"""

from dataclasses import dataclass

from llama_lora.model.folder.shape import head_size
from llama_lora.train.compute.attention_kernels import EFFICIENT, LOOP, VARLEN

FP32 = INT32 = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
IDS = 4 * 8  # ids, labels, positions and keys
INPUTS = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Attention:
    """The kernel of attention, and what it has room for besides tensors of queries and keys.

    Attributes:
        kernel: see `attention_kernels.kernel_for`.
        log_sums, sums: log-sum-exps, and rows of the fp32 sums of dQ, for each token; more than one
            where a kernel pads examples.
    """

    kernel: str = LOOP
    log_sums: float = 1
    sums: float = 1


@dataclass(frozen=True)
class Layer:
    """One decoder layer in training: bytes per token of a micro-batch.

    Attributes:
        query, key: size of the queries of all heads, and of the keys or the values.
        targets: names of the linear layers with LoRA matrices.
        size: bytes per element of the activations: 2 in fp16 and bf16, 4 in fp32.
        on_card: whether its memory is a card's. There peft's dropout masks take a byte per element.
        attention: how it is computed.
        dora: whether peft computes the adapted layers, instead of `lora_products`.
    """

    hidden: int
    intermediate: int
    heads: int
    query: int
    key: int
    targets: tuple[str, ...]
    r: int
    size: int
    dropout: float
    on_card: bool = True
    attention: Attention = Attention()
    dora: bool = False

    @classmethod
    def of(cls, config, targets, *others, **more) -> "Layer":
        """The layer of a Llama's config of transformers.

        Args:
            targets: as above, or ["all-linear"].
            others, more: the attributes from `r` on.
        """
        heads, head = config.num_attention_heads, head_size(config)
        kv_heads = config.num_key_value_heads or heads
        targets = ATTENTION + MLP if "all-linear" in targets else tuple(targets)
        return cls(
            config.hidden_size,
            config.intermediate_size,
            heads,
            heads * head,
            kv_heads * head,
            targets,
            *others,
            **more,
        )

    def width(self, name: str) -> int:
        """The input size of a linear layer."""
        return {"o_proj": self.query, "down_proj": self.intermediate}.get(name, self.hidden)

    # What the backward pass needs.

    def kept(self) -> float:
        """What a layer without checkpointing keeps for its backward pass."""
        return self.of_attention() + self.of_mlp()

    def of_lora(self, *names: str) -> int:
        """The outputs of A; peft also keeps the inputs after dropout, with the masks."""
        adapted = [name for name in names if name in self.targets]
        ranks = self.size * self.r * len(adapted)
        if not (self.dora and self.dropout):
            return ranks
        mask = 1 if self.on_card else self.size
        return ranks + sum((self.size + mask) * self.width(name) for name in adapted)

    def of_input(self, *names: str) -> int:
        """The input that linear layers share; peft keeps it only if A multiplies it as it is."""
        adapted = any(name in self.targets for name in names)
        kept = adapted and not (self.dora and self.dropout)
        return self.size * self.width(names[0]) if kept else 0

    def of_norm(self) -> int:
        """Its input, and the reciprocal of the root mean square."""
        return self.size * self.hidden + FP32

    def of_attention(self) -> int:
        """Among others, queries, keys and values, the result, and the log-sum-exps."""
        keys = self.query if self.repeats else self.key
        return (
            self.of_norm()
            + self.of_input("q_proj", "k_proj", "v_proj")
            + 2 * self.size * (self.query + keys)
            + FP32 * self.heads * self.attention.log_sums
            + self.of_o_proj()
            + self.of_lora("q_proj", "k_proj", "v_proj")
        )

    def of_o_proj(self) -> int:
        """Its input is the kernel's result, which is copied only from several calls."""
        copied = self.attention.kernel == LOOP
        return self.of_input("o_proj") * copied + self.of_lora("o_proj")

    @property
    def repeats(self) -> bool:
        """Whether keys and values are kept repeated for each query of a group."""
        return self.attention.kernel == LOOP and self.on_card

    def of_mlp(self) -> int:
        """Among others, the outputs of gate and up, from which the rest is computed again."""
        return (
            self.of_norm()
            + self.of_input("gate_proj", "up_proj")
            + 2 * self.size * self.intermediate
            + (self.of_input("down_proj") if self.dora else 0)
            + self.of_lora(*MLP)
        )

    # What it holds besides, while it goes backward.

    def peak(self, tiles: int) -> float:
        """The most that it holds while it recomputes and goes backward.

        With what it then keeps and the gradient of its output, on top of `checkpoint_per_token`.
        """
        mlp = self.of_mlp() + self._in_mlp()
        if tiles > 1:
            mlp = 2 * self.size * self.hidden + mlp / tiles  # its input, and the gradient of that
        return self.of_attention() + max(mlp, *self._in_attention())

    def _in_mlp(self) -> int:
        """Gradients of its parts, and what is computed again; all as wide as the gate."""
        wide = self.size * self.intermediate
        if self.dora:
            return 6 * wide
        if "down_proj" not in self.targets:
            return 5 * wide
        return 4 * wide + self._in_dropout("down_proj")

    def _in_attention(self) -> list[int]:
        query, key = self.size * self.query, self.size * self.key
        # Of queries, keys and values; on a card, kernels sum dQ in fp32, and what they return, or
        # take, for grouped queries has been repeated.
        gradients = 2 * query + 2 * (query if self.repeats else key)
        if self.on_card:
            gradients += FP32 * self.query * self.attention.sums
        if self.key < self.query:
            gradients += {VARLEN: 2, EFFICIENT: 4}.get(self.attention.kernel, 0) * query
        of_input = query * (2 if self.dropout else 1) + self._in_dropout("o_proj")
        return [of_input, gradients - self.of_o_proj()]

    def _in_dropout(self, name: str) -> int:
        """The mask of a layer's input, a byte each, and the gradient of A's outputs."""
        return self.width(name) + self.size * self.r if self.dropout else 0


def checkpoint_per_token(config, itemsize: int) -> int:
    """Bytes per token that one layer with checkpointing keeps: its input."""
    return itemsize * config.hidden_size


def masks_per_token(targets, dropout: float) -> int:
    """Bytes per token for where the rows of a layer's dropout masks begin, whatever recomputes."""
    targets = ATTENTION + MLP if "all-linear" in targets else targets
    adapted = sum(any(name in targets for name in names) for names in INPUTS)
    return INT32 * adapted if dropout else 0


def beside_layers_per_token(config, itemsize: int) -> int:
    """Bytes per token held while layers go backward: rotary angles, ids, labels and keys."""
    return 2 * itemsize * head_size(config) + IDS


def ends_per_token(config, itemsize: int) -> int:
    """Bytes per token that are kept outside the layers until the layers go backward.

    Besides the above: the last norm's input, and the gradient of the hidden states that the loss in
    chunks computes; `Layer.peak` has the gradient that this turns into.
    """
    hidden = config.hidden_size
    last = 2 * itemsize * hidden + FP32
    return beside_layers_per_token(config, itemsize) + last


# DoRA: peft computes products with the frozen weights a second time for the magnitudes.


def dora_per_token(targets: dict[str, tuple[int, int]], itemsize: int) -> int:
    """Bytes per token that a layer keeps in addition: the results that its magnitudes scale.

    Args:
        targets: linear layers with magnitudes, each with its outputs and inputs.
    """
    return 2 * itemsize * sum(outputs for outputs, _ in targets.values())


def dora_weights(targets, quantization: str, itemsize: int, dropout: float) -> int:
    """Bytes of unfolded weights that a layer keeps for the second product, with dropout."""
    unfolds = dropout and quantization != "none"
    return itemsize * sum(out * into for out, into in targets.values()) if unfolds else 0


def dora_workspace(targets) -> int:
    """Bytes to make the largest B·A, by a product with the identity, and add it to the weight."""
    return FP32 * max(into * into + 3 * out * into for out, into in targets.values())


def dequantized_bytes(config, quantization: str, itemsize: int) -> int:
    """Bytes of the largest weight dequantized for a product, whatever the number of tokens."""
    if quantization == "none":
        return 0
    return itemsize * config.hidden_size * config.intermediate_size
