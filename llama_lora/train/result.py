"""What a finished run leaves: the adapter, its model card, and summary.json."""

import json
from pathlib import Path

from llama_lora.hardware.device import device_name, dtype_name
from llama_lora.model import adapter, model_card
from llama_lora.train import checkpoints
from llama_lora.train.memory.peak import peak_memory


def save(trainer, template, summary: dict) -> None:
    """Write all of it into the run's output folder, and verify the adapter."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        with checkpoints.writing(folder):
            adapter.save(trainer.model, template, folder, trainer.args.base_name)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            model_card.write(folder)


def summary(trainer, quantization: str, forecast, data_args, stages: list[dict]) -> dict:
    """The result of the run in figures, over all processes and resumes.

    Args:
        forecast: the predictions made before it.
        stages: the accounts of the stages that made the corpus.
    """
    args, best = trainer.args, trainer.best
    trained, total = trainer.model.get_nb_trainable_parameters()
    held_out = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return {
        "steps": trainer.state.global_step,
        "trainable_parameters": trained,
        "parameters": total,
        "labelled_tokens": trainer.totals.labelled,
        "held_out_loss_before": held_out[0] if held_out else None,
        "held_out_loss_after": best.loss if held_out else None,
        "best_step": best.step if held_out else None,
        "minutes": trainer.totals.seconds() / 60,
        "peak_memory_bytes": peak_memory(),
        "processes": args.world_size,
        "device": device_name(),
        "compute_dtype": dtype_name(args.compute_dtype),
        "quantization": quantization,
        "planned": forecast.summary(),
        "settings": _settings(data_args, args),
        "data": stages,
    }


def _settings(data_args, args) -> dict:
    """Flags by name; evaluating the adapter needs those of the data."""
    told = (
        (data_args, ["data_path", "eval_data_path", "eval_ratio", "model_max_length"]),
        (args, ["learning_rate", "num_train_epochs", "gradient_accumulation_steps", "seed"]),
    )
    return {name: getattr(part, name) for part, names in told for name in names}
