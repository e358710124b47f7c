"""Lets the adapted layers of a model compute as `lora_products` does.

A layer with one plain LoRA adapter does so; all others (DoRA, several adapters, adapters that are
off or merged, weights of a kind that is not known) keep peft's own forward pass. What is saved, and
under which names, stays peft's.
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer

from llama_lora.hardware.device import autocast
from llama_lora.model import frozen_weight
from llama_lora.train.compute.dropout import Dropout
from llama_lora.train.compute.lora_products import Adapted, Products

SHARING = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # an input, as a rule


def set_up(model, seed: int) -> None:
    """Let the layers of a peft model compute so.

    From now on, its base also takes `token_keys`, see `Dropout.draw`; without them, tokens are
    numbered.
    """
    layers = {name: module for name, module in model.named_modules() if adapted(module)}
    dropout = Dropout(max(map(_dropped, layers.values()), default=0.0), seed, model.device)
    groups = _by_input(layers)
    inputs = [SharedInput([layers[name] for name in names], dropout) for names in groups]
    begin = partial(_begin, dropout, inputs)
    model.get_base_model().register_forward_pre_hook(begin, with_kwargs=True)


def _begin(dropout: Dropout, inputs: list, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What precedes each forward pass of the base."""
    for one in inputs:
        one.forget()
    keys = kwargs.pop("token_keys", None)
    if module.training and dropout.share:
        ids = args[0] if args else kwargs["input_ids"]
        if keys is None:
            keys = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        dropout.draw(keys)
    return args, kwargs


def dropout_of(module) -> Dropout | None:
    """The dropout of the adapted layers in `module`, if any compute so."""
    shared = filter(None, map(_shared, module.modules()))
    return next((one.dropout for one in shared), None)


def adapted(module) -> Adapted | None:
    """What `module` computes, if that is a product with one plain adapter beside it."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return None
    plain = len(module.active_adapters) == 1 and not (module.lora_variant or module.fan_in_fan_out)
    if not plain or not frozen_weight.is_known(module.base_layer):
        return None
    (name,) = module.active_adapters
    if name not in module.lora_A or module.lora_bias[name]:
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Adapted(module.base_layer, a, b, module.scaling[name])


def _dropped(module) -> float:
    """The share of its input that `module` drops."""
    (name,) = module.active_adapters
    return getattr(module.lora_dropout[name], "p", 0.0)


def _by_input(names) -> list[list[str]]:
    """The names of layers in groups that, as a rule, get the same input."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        sharing = next((group for group in SHARING if child in group), (child,))
        groups.setdefault((parent, sharing), []).append(name)
    return list(groups.values())


class SharedInput:
    """Adapted layers with the same input: the first that is called computes the results of all."""

    def __init__(self, modules: list, dropout: Dropout):
        self.modules, self.dropout = modules, dropout
        self.number = dropout.add_input()
        self.forget()
        for module in modules:
            module.forward = partial(self.result, module)

    def forget(self) -> None:
        """Drop results that no layer has asked for, because an error came before."""
        self.given, self.waiting = None, {}

    def result(self, module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """What the forward pass of `module` returns for `x`: [..., in] -> [..., out]."""
        if not (x is self.given and module in self.waiting):
            arguments = None if args or kwargs else self.arguments(x)
            if arguments is None:
                return type(module).forward(module, x, *args, **kwargs)
            (rows,) = autocast(x)
            found = Products.apply(rows.flatten(0, -2), *arguments)
            found = [result.unflatten(0, x.shape[:-1]) for result in found]
            self.waiting = dict(zip(self.modules, found, strict=True))
        result = self.waiting.pop(module)
        self.given = x if self.waiting else None
        return result

    def arguments(self, x: torch.Tensor) -> tuple | None:
        """What `Products` takes besides `x`; None if peft computes the layers.

        It does so unless all are plain, and each token of `x` has a row of the mask: that of an
        expert, which gets some of the tokens, has none.
        """
        masks = None, None
        if self.modules[0].training and self.dropout.share:
            masks = self.dropout, self.dropout.begins(self.number)
            if len(masks[1]) != x.shape[:-1].numel():
                return None
        layers = [adapted(module) for module in self.modules]
        if not all(layers):
            return None
        return layers, masks, *(matrix for layer in layers for matrix in (layer.a, layer.b))


def arguments_of(module, x: torch.Tensor) -> tuple | None:
    """`SharedInput.arguments` of a layer that shares `x` with no other; else None."""
    shared = _shared(module)
    alone = shared is not None and shared.modules == [module]
    return shared.arguments(x) if alone else None


def _shared(module) -> SharedInput | None:
    found = getattr(getattr(module.forward, "func", None), "__self__", None)
    return found if isinstance(found, SharedInput) else None
