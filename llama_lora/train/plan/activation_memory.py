"""Bytes of activations in LoRA training of a Llama, from its config alone.

What transformers, peft and bitsandbytes keep for the backward pass, and what else they hold, was
read in their sources; tests compare it with what torch really holds. All figures are per token of a
micro-batch; what does not grow with the tokens has functions of its own.
"""

from dataclasses import dataclass

from llama_lora.model.folder.shape import head_size
from llama_lora.train.compute.attention_kernels import EFFICIENT, LOOP, VARLEN

FP32 = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
IDS = 3 * 8  # ids, labels and positions


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
    """One decoder layer in training.

    Attributes:
        query, key: size of the queries of all heads, and of the keys or the values.
        targets: names of the linear layers with LoRA matrices.
        quantization: of the frozen weights: "8bit", "4bit" or "none".
        size: bytes per element of the activations: 2 in fp16 and bf16, 4 in fp32.
        on_card: on a card, a dropout mask takes a byte per element; on a CPU it is an ordinary
            tensor.
        attention: how it is computed.
    """

    hidden: int
    intermediate: int
    heads: int
    query: int
    key: int
    targets: tuple[str, ...]
    r: int
    quantization: str
    size: int
    dropout: float
    on_card: bool
    attention: Attention

    @classmethod
    def of(cls, config, targets, *others) -> "Layer":
        """The layer of a transformers config."""
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
        )

    def width(self, name: str) -> int:
        """The input size of a linear layer."""
        return {"o_proj": self.query, "down_proj": self.intermediate}.get(name, self.hidden)

    # What the backward pass needs.

    def of_lora(self, *names: str) -> int:
        """The inputs after dropout with the masks, and the outputs of A."""
        adapted = [name for name in names if name in self.targets]
        dropped = self.size if self.dropout else 0
        return sum(
            dropped * self.width(name) + self.mask(self.width(name)) + self.size * self.r
            for name in adapted
        )

    def of_input(self, *names: str) -> int:
        """The input that linear layers share; without dropout, A multiplies it as it is."""
        adapted = any(name in self.targets for name in names)
        return self.size * self.width(names[0]) if adapted and not self.dropout else 0

    def of_norm(self) -> int:
        """Its input in fp32, and the reciprocal of the root mean square."""
        return FP32 * self.hidden + FP32

    def of_attention(self) -> int:
        """Among others, queries, keys and values, the result, and the log-sum-exps."""
        keys = self.query if self.repeats else self.key
        return (
            self.of_norm()
            + self.of_input("q_proj", "k_proj", "v_proj")
            + 2 * self.size * (self.query + keys)
            + FP32 * self.heads * self.attention.log_sums
            + self.of_input("o_proj")
            + self.of_lora(*ATTENTION)
        )

    @property
    def repeats(self) -> bool:
        """Whether keys and values are kept repeated for each query of a group."""
        return self.attention.kernel == LOOP and self.on_card

    def of_mlp(self) -> int:
        """Among others, the outputs of gate and up, and the gate's SiLU."""
        return (
            self.of_norm()
            + self.of_input("gate_proj", "up_proj")
            + 3 * self.size * self.intermediate
            + self.of_input("down_proj")
            + self.of_lora(*MLP)
        )

    # The most it holds besides its input while it recomputes and goes backward.

    def peak(self, tiles: int) -> float:
        stream, wide = self.size * self.hidden, self.size * self.intermediate
        attention = self.of_attention() - self.shared() + stream
        if tiles > 1:
            inside = max(self._mlp_moments(self.of_norm() - self.shared(), tiled=True))
            mlp = 2 * stream + inside / tiles  # its input, and the gradient of that
            return max(attention + max(mlp, *self._attention_moments()), self._first_norm())
        # The gradient that the last product gives or takes before the layer has to be recomputed:
        # of what autograd saves, not of what quantized products keep by themselves.
        ahead = 0 if self.quantization == "none" else wide
        if "down_proj" in self.targets:
            ahead = stream
        mlp = max(self._mlp_moments(self.of_norm(), tiled=False, ahead=ahead))
        return max(attention + max(mlp, *self._attention_moments(ahead)), self._first_norm())

    def shared(self) -> int:
        """In fp32 a norm keeps its input itself instead of a copy."""
        return self.size * self.hidden if self.size == FP32 else 0

    def _mlp_moments(self, norm: int, tiled: bool, ahead: int = 0) -> list[float]:
        stream, wide = self.size * self.hidden, self.size * self.intermediate
        loras = self.of_lora("gate_proj", "up_proj")
        adapted = "down_proj" in self.targets
        mask = self.mask(self.intermediate) if adapted else 0
        forward = norm + stream + ahead  # with the norm's output
        backward = norm + self.of_input("gate_proj", "up_proj")
        if tiled:
            backward += stream  # the tile's result
        else:
            forward += stream - self.shared()  # the residuals
        moments = [
            forward + self.of_lora("gate_proj") + self._results("gate_proj"),
            forward + loras + 2 * wide + self._results("up_proj"),
            # Gradients: of A's input, before and after dropout, and of gate and up.
            backward + self.of_lora(*MLP) + self.of_input("down_proj") + 4 * wide,
            backward + loras + mask + 5 * wide,
            backward + loras + 6 * wide,
            norm - FP32 + stream * tiled + 5 * FP32 * self.hidden,
        ]
        if adapted or tiled:  # otherwise recomputing ends before the last product
            copies = 2 if adapted and self.quantization == "4bit" else 1
            results = 3 if adapted and tiled else 1  # else it ends when A's output is there
            moments += [
                forward + loras + 4 * wide + copies * stream,
                forward + self.of_lora(*MLP) + 4 * wide + results * stream,
            ]
        return moments

    def _attention_moments(self, ahead: int = 0) -> list[int]:
        stream, query, key = (self.size * n for n in (self.hidden, self.query, self.key))
        # Keys and values before they are repeated, and inputs that are not kept.
        grouped = self.key < self.query
        shown = ahead + (2 * key if grouped and self.repeats else 0)
        shown += 0 if self.of_input("q_proj", "k_proj", "v_proj") else stream
        shown += 0 if self.of_input("o_proj") else query
        of_o = self.of_lora("o_proj") + self.of_input("o_proj")
        # Of queries, keys and values; on a card, kernels sum dQ in fp32, and what they return, or
        # take, for grouped queries has been repeated.
        gradients = 2 * query + 2 * (query if self.repeats else key)
        if self.on_card:
            gradients += FP32 * self.query * self.attention.sums
        if grouped:
            gradients += {VARLEN: 2, EFFICIENT: 4}.get(self.attention.kernel, 0) * query
        return [
            shown + stream * (3 if "o_proj" in self.targets else 1),
            # Gradients of A's input, before and after dropout.
            query,
            2 * query - of_o,
            gradients - of_o,
        ]

    def _first_norm(self) -> int:
        """Its backward pass, when all that came after it is gone but the gradient beside it."""
        stream = self.size * self.hidden
        return self.of_norm() - self.shared() - FP32 + stream + 5 * FP32 * self.hidden

    def _results(self, name: str) -> int:
        """The results of a linear layer in the MLP: its own, B's, and B's scaled."""
        return self.size * self.intermediate * (3 if name in self.targets else 1)

    def mask(self, width: int) -> int:
        """A dropout mask."""
        return width * (1 if self.on_card else self.size) if self.dropout else 0


def kept_per_token(
    config, targets, lora_r, quantization, itemsize, dropout, on_card=True, attention=Attention()
) -> float:
    """Bytes per token that one layer without checkpointing keeps for its backward pass.

    Args:
        config: a Llama's config of transformers.
        targets: names of the linear layers with LoRA matrices, or ["all-linear"].
        itemsize: bytes per element of the activations.
    """
    layer = Layer.of(config, targets, lora_r, quantization, itemsize, dropout, on_card, attention)
    return layer.of_attention() + layer.of_mlp()


def layer_peak_per_token(
    config,
    targets,
    lora_r,
    quantization,
    itemsize,
    dropout,
    on_card=True,
    attention=Attention(),
    mlp_tiles=1,
) -> float:
    """The most bytes per token that one layer takes while it recomputes and goes backward.

    They include what it then keeps and the gradient of its output, and come on top of
    `checkpoint_per_token`.
    """
    layer = Layer.of(config, targets, lora_r, quantization, itemsize, dropout, on_card, attention)
    return layer.peak(mlp_tiles)


def checkpoint_per_token(config, itemsize: int) -> int:
    """Bytes per token that one layer with checkpointing keeps: its input."""
    return itemsize * config.hidden_size


def beside_layers_per_token(config, itemsize: int) -> int:
    """Bytes per token held while layers go backward: rotary angles, ids and labels."""
    return 2 * itemsize * head_size(config) + IDS


def ends_per_token(config, itemsize: int) -> int:
    """Bytes per token that are kept outside the layers until the layers go backward.

    Besides the above: the last norm's input in fp32, and the gradient of the hidden states that the
    loss in chunks computes; `layer_peak_per_token` has the gradient that this turns into.
    """
    hidden = config.hidden_size
    last = FP32 * hidden + FP32 + itemsize * hidden
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
