"""Bytes that DeepSpeed takes for the trained parameters: read in its sources, tested against it."""

from dataclasses import dataclass

from llama_lora.train.plan.activation_memory import FP32

BUCKET = 5e8  # DeepSpeed's default, in elements


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's engine, which keeps the parameters in the compute dtype, in one flat copy.

    Beside it, in fp32, are those that the optimizer reads, and its states. From stage 1 on, each
    process has its share of them, and from stage 2 on its share of the gradients.

    Attributes:
        itemsize: bytes per element of the flat copy and of its gradients.
        buckets: elements of all buckets in which gradients are reduced.
    """

    stage: int
    itemsize: int
    processes: int
    buckets: float

    @classmethod
    def of(cls, args, itemsize: int, processes: int, hidden: int) -> "Zero | None":
        """By `TrainingArguments`, for a compute dtype; None where torch trains by itself.

        `hidden` is the base's hidden size, which transformers makes buckets of "auto" by.
        """
        config = getattr(args, "hf_deepspeed_config", None)

        def setting(name: str, default):
            return config.get_value(f"zero_optimization.{name}", default)

        if config is None:
            return None
        stage = setting("stage", 0)
        if stage == 0:
            return None if itemsize == FP32 else cls(0, itemsize, 1, 0)
        twice = 2 if setting("overlap_comm", False) else 1
        contiguous = setting("contiguous_gradients", True)
        size = setting("reduce_bucket_size", BUCKET)
        size = hidden**2 if size == "auto" else size
        return cls(stage, itemsize, processes, twice * size if contiguous else 0)

    @property
    def matrices(self) -> int:
        """Bytes per parameter of the matrices that the layers use."""
        return self.itemsize

    @property
    def gradients(self) -> float:
        """Bytes per parameter: computed apart in fp32, and those that the engine keeps."""
        return FP32 + self.itemsize / (self.processes if self.stage >= 2 else 1)

    def optimizer(self, states: int) -> float:
        """Bytes per parameter, given those of the optimizer's states: with the fp32 copy."""
        return (FP32 + states) / self.processes

    def in_a_step(self, parameters: int) -> float:
        """Bytes more while gradients are reduced or applied, when no activations are there.

        First the buckets, then the gradients made flat and, from 16 bits, cast to fp32.
        """
        cast = FP32 if self.itemsize < FP32 else 0
        flat = parameters * (self.itemsize + cast) / self.processes
        return max(self.itemsize * self.buckets, flat)
