"""Keys and values of the tokens so far, with room for those to come.

transformers' own cache copies all that it holds to append a token: of a 7B at 2,048 tokens, 1 GiB.
"""

from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

STEP = 256  # tokens; copying then moves a 128th of what attention reads


def whole(longest: int) -> Cache:
    """A cache that holds every token, even where a layer has a window, so that it can be cut back.

    Args:
        longest: tokens that it holds at most.
    """
    return Cache(layer_class_to_replicate=partial(GrowingLayer, longest))


def by_layer(config, longest: int) -> Cache:
    """A cache in which layers with a window hold no more than that; these are transformers' own.

    Args:
        config: of the model.
        longest: tokens that it holds at most.
    """
    layers = DynamicCache(config=config).layers
    return Cache([GrowingLayer(longest) if type(one) is DynamicLayer else one for one in layers])


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, [rows, heads, tokens, size]; its rows stay in their order."""

    def __init__(self, longest: int):
        super().__init__()
        self._longest = longest

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = Room(self._longest), Room(self._longest)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to both; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        for_keys, for_values = self._rooms
        self.keys = for_keys.append(held, key_states)
        self.values = for_values.append(held, value_states)
        return self.keys, self.values


class Room:
    """Memory for a tensor [rows, heads, tokens, size] that grows by `STEP` tokens at a time."""

    def __init__(self, longest: int):
        self._longest = longest
        self._memory = None

    def append(self, held: int, states: torch.Tensor) -> torch.Tensor:
        """A view of the first `held` tokens, and of `states` after them."""
        rows, heads, new, size = states.shape
        total = held + new
        if self._memory is None or total > self._memory.shape[2]:
            tokens = max(total, min(-(-total // STEP) * STEP, self._longest))
            larger = states.new_empty(rows, heads, tokens, size)
            if held:
                larger[:, :, :held] = self._memory[:, :, :held]
            self._memory = larger
        self._memory[:, :, held:total] = states
        return self._memory[:, :, :total]
