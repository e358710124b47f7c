"""What to change so that a training fits: the cheapest flags first."""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

from llama_lora.train.plan.memory_plan import Plan, Setup, memory, plan

SHORTEST = 128  # tokens; a shorter length is not worth suggesting

Change = tuple[str, Callable[[Setup], Setup]]  # flags, and what they do to a setup


def changes(setup: Setup) -> list[Change]:
    """What can be changed, from what costs nothing to what costs quality of the adapter."""
    found: list[Change] = []

    def offer(flags: str, **values) -> None:
        found.append((flags, lambda setup: replace(setup, **values)))

    if setup.recompute == "False":
        offer("--gradient_checkpointing auto", recompute="auto")
    if setup.parts == 1 and setup.longest < setup.tokens:
        offer("--per_device_train_batch_size auto", parts=setup.tokens)
    if setup.mlp_tiles != "auto":
        offer("--mlp_tiles auto", mlp_tiles="auto")
    if setup.on_card and not setup.offload:
        recompute = "--gradient_checkpointing True " if setup.recompute == "False" else ""
        offer(f"{recompute}--offload_activations True", offload=True, recompute="True")
    if setup.on_card and "8bit" not in setup.optim:
        offer("--optim paged_adamw_8bit", optim="paged_adamw_8bit")
    if setup.quantization != "4bit" and not setup.shape.stored_quantized:
        offer("--quantization 4bit", quantization="4bit")
    if setup.lora_r > 8:
        offer("--lora_r 8", lora_r=8)
    length = setup.longest // 2
    while length >= SHORTEST:
        # The corpus must be split again, too: what is beyond the length would not be learned.
        offer(f"--model_max_length {length}", **shortened(setup, length))
        length //= 2
    return found


def shortened(setup: Setup, length: int) -> dict[str, int]:
    shrinking = "tokens", "log_sums", "sum_rows"
    scaled = {name: getattr(setup, name) * length // setup.longest for name in shrinking}
    return {"longest": length, **scaled}


def ways_to_fit(setup: Setup, available: float, most: int = 3) -> list[tuple[str, Plan]]:
    """Single changes that make it fit or, if none does, the cheapest that do so together.

    If no change leaves some room, those that just fit. Empty if nothing helps, because the base
    itself is too large.
    """
    for enough in (attrgetter("comfortable"), attrgetter("fits")):
        if found := _alone(setup, available, enough)[:most] or _together(setup, available, enough):
            return found
    return []


def _alone(setup: Setup, available: float, enough) -> list[tuple[str, Plan]]:
    """Each offer that is enough by itself; of lengths, only the longest."""
    fitting: dict[str, tuple[str, Plan]] = {}
    for flags, change in changes(setup):
        found = plan(change(setup), available)
        if enough(found):
            fitting.setdefault(flags.split()[0], (flags, found))
    return list(fitting.values())


def _together(setup: Setup, available: float, enough) -> list[tuple[str, Plan]]:
    """The offers that together are enough, taken in order; none if even all are not enough."""
    taken: list[Change] = []
    for offer in changes(setup):
        taken = [one for one in taken if not _replaces(offer, one)] + [offer]
        if enough(_applied(taken, setup, available)):
            break
    else:
        return []
    for offer in list(taken):  # drop what turned out to be needless
        without = [one for one in taken if one is not offer]
        if without and enough(_applied(without, setup, available)):
            taken = without
    return [(" ".join(flags for flags, _ in taken), _applied(taken, setup, available))]


def _replaces(offer: Change, earlier: Change) -> bool:
    """Whether it sets the same flag as the earlier one."""
    return offer[0].split()[0] == earlier[0].split()[0]


def _applied(taken: list[Change], setup: Setup, available: float) -> Plan:
    for _, change in taken:
        setup = change(setup)
    return plan(setup, available)


def least(setup: Setup) -> float:
    """Bytes that it takes with every change made."""
    for _, change in changes(setup):
        setup = change(setup)
    return sum(memory(setup, setup.shape.layers).values())
