"""A base model and the adapters on it, of which one or none is in use."""

from functools import partial
from pathlib import Path

from llama_lora.chat.streaming import Decoder
from llama_lora.cli import InputError
from llama_lora.hardware.device import device_name, dtype_name
from llama_lora.model.adapter import check_fits, load_adapter, read_weights
from llama_lora.model.base import load_base
from llama_lora.model.folder.config import check_folder, resolve_precision
from llama_lora.model.template import Template, has_tokenizer, load_template

BASE = "base"  # the name of the base alone


class Adapters:
    """The model, and the templates of each adapter and of the base alone, by name.

    People choose by these names; the first is in use at the beginning.
    """

    def __init__(self, model, templates: dict[str, Template]):
        self.model = model
        self.templates = templates
        self._used = next(iter(templates))

    @property
    def names(self) -> list[str]:
        return list(self.templates)

    @property
    def first(self) -> Template:
        """The template of what is in use at the beginning."""
        return next(iter(self.templates.values()))

    def use(self, name: str) -> None:
        """Make the model answer with this adapter, or as the base alone."""
        if name == self._used:
            return
        if name == BASE:
            self.model.base_model.disable_adapter_layers()
        else:
            if self._used == BASE:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(in_peft(self.names.index(name)), inference_mode=True)
        self._used = name

    def decoder(self, name: str) -> Decoder:
        """A decoder that answers with that adapter, whichever is used in between.

        Raises:
            InputError: there is no adapter of that name.
        """
        if name not in self.templates:
            raise InputError(f"no adapter is called {name}; there are {', '.join(self.names)}")
        return Decoder(self.model, self.templates[name], partial(self.use, name))


def load_adapters(
    base_model, folders: dict[str, Path], quantization="none", template="auto"
) -> tuple[Adapters, str]:
    """Load a base and the adapters in `folders`, by name: `Adapters`, and a line about them.

    Args:
        base_model: a Hugging Face model folder.
        folders: adapter folders. Their tokenizers and templates are used if they have them.
        quantization: of the base's weights, as `--quantization`.
        template: as `Template`, or "auto": the tokenizer's own template, else vicuna_v1.1.

    Raises:
        InputError: a folder does not hold what it should, or an adapter is for another base.
    """
    # These are checked first, before the minutes that loading a large base takes.
    weights = [read_weights(folder) for folder in folders.values()]
    check_folder(Path(base_model))
    quantization, reason = resolve_precision(base_model, quantization)
    templates = {
        name: load_template(folder if has_tokenizer(folder) else base_model, template)
        for name, folder in folders.items()
    }
    templates[BASE] = template_of_base(base_model, template, *templates.values())
    model = attached(load_base(base_model, quantization), list(folders.values()), weights)
    adapters = Adapters(model, templates)
    first = adapters.first
    with_them = f" with {', '.join(map(str, folders.values()))}" if folders else ""
    own = first.name == "model"
    summary = (
        f"{base_model}{with_them} · {reason} · {dtype_name(model.dtype)} on {device_name()} · "
        f"template {first.name}{f' of {first.tokenizer.name_or_path}' if own else ''}"
    )
    return adapters, summary


def load(base_model, lora_weights=None, quantization="none", template="auto"):
    """A base with one adapter or none: the model, its `Template`, and a line about them."""
    folders = {"adapter": lora_weights} if lora_weights else {}
    adapters, summary = load_adapters(base_model, folders, quantization, template)
    return adapters.model, adapters.first, summary


def named_folders(given: list[str]) -> dict[str, Path]:
    """Adapter folders by name, from NAME=FOLDER, or FOLDER alone: its name is the last of its path.

    Raises:
        InputError: two have the same name, or one has the name of the base.
    """
    folders = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = Path(text).resolve().name, text
        if name == BASE or name in folders or not name:
            taken = "the base alone is called that" if name == BASE else "another has that name"
            raise InputError(
                f"--lora_weights {text}: its name would be {name!r}, but {taken}; "
                "choose a name: NAME=FOLDER"
            )
        folders[name] = Path(folder)
    return folders


def attached(model, folders: list[Path], weights: list[dict]):
    """`model` with the adapters in `folders` on it, after checking that they fit."""
    for folder, tensors in zip(folders, weights, strict=True):
        check_fits(folder, tensors, model)
    for number, (folder, tensors) in enumerate(zip(folders, weights, strict=True)):
        model = load_adapter(model, folder, tensors, in_peft(number))
    return model.eval()


def in_peft(number: int) -> str:
    """peft's name for the `number`-th adapter; it could not take all names that people use."""
    return "default" if number == 0 else f"adapter{number}"


def template_of_base(folder, name: str, *of_adapters: Template) -> Template:
    """The template for the base alone; the first adapter's if the base has no tokenizer."""
    if not of_adapters:
        return load_template(folder, name)
    if not has_tokenizer(folder):
        return of_adapters[0]
    return load_template(folder, "auto" if name == "model" else name)
