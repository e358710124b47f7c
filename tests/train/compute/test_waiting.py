"""Training does not wait for the card more often for more layers or examples."""

import numpy as np
import pytest
import torch
import transformers

from benchmarks.training.launches import moved_to_meta
from llama_lora.hardware.device import DTYPE_SWITCH
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import collate
from llama_lora.train.memory import gradient_checkpointing, tiled_mlp
from llama_lora.train.memory.out_of_memory import Gradients
from tests.conftest import TRAIN, run_here, shipped
from tests.corpora import save
from tests.train.adapted import adapted_llama, layers_of, trainable
from tests.train.compute import bases
from tests.train.compute.waiting import Waiting

# transformers asks once a forward pass whether the positions in a row start again.
ONCE_A_PASS = "aten::_local_scalar_dense", "masking_utils.py find_packed_sequence_indices"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def micro_batch(count: int) -> dict:
    """Of so many examples, in which every third token is not labelled."""
    rows = [np.arange(7 + n, dtype=np.int32) + 1 for n in range(count)]
    examples = [Example("", "", row, np.where(row % 3, row, -100)) for row in rows]
    batch = collate([examples])
    del batch["names"]
    return batch


def gradients(model, batch: dict, dtype, parts: int = 1, **more):
    def loss_of(part):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(**part, num_items_in_batch=100, **more).loss

    return Gradients(trainable(model), pytest.fail, parts).compute(loss_of, batch, scale=8.0)


def recomputing(model, tile: int):
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
    tiled_mlp.set_up(model.get_base_model(), layers_of(model), tile)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_no_layer_and_no_loss_waits(quantization, dtype, tmp_path):
    model = adapted_llama(tmp_path, quantization, dtype, dropout=0.1)
    for one in (model, recomputing(model, 16)):
        for parts in (1, 3):
            with Waiting() as waiting:
                gradients(one, micro_batch(5), dtype, parts)
            assert waiting.found == {ONCE_A_PASS: parts}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_layers_and_loss_need_no_values(quantization, dtype, tmp_path):
    """On the meta device, where to ask for a value, or to copy one to the host, is an error."""
    model = adapted_llama(tmp_path, quantization, dtype)
    moved_to_meta(model)
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in micro_batch(5).items()}
    mask = torch.ones_like(batch["input_ids"])  # with which transformers looks at no positions
    loss, found = gradients(model, batch, torch.float32, attention_mask=mask)
    assert loss.is_meta
    assert [one.shape for one in found] == [one.shape for one in trainable(model)]


# Who waits in a training, and how often; without DeepSpeed, whose engine has its own.
A_MICRO_BATCH = {ONCE_A_PASS: 1, ("aten::_local_scalar_dense", "stopping.py is_finite"): 1}
A_STEP = {
    ("aten::_local_scalar_dense", "logs.py on_step_end"): 1,
    ("aten::_local_scalar_dense", "trainer.py _maybe_log_save_evaluate"): 2,
}


IN_FP16 = (
    A_MICRO_BATCH | {("aten::_local_scalar_dense", "trainer.py _loss_scale"): 1},
    A_STEP | {("aten::_local_scalar_dense", "stopping.py _was_skipped"): 1},
)


@pytest.mark.parametrize(("layers", "dtype"), [(1, "float32"), (3, "float32"), (3, "float16")])
def test_who_waits_in_a_training(layers, dtype, llama_tokenizer, tmp_path, monkeypatch):
    """Whatever the number of layers, and of examples in a micro-batch."""
    base = bases.saved(tmp_path / "base", "llama", llama_tokenizer, num_hidden_layers=layers)
    corpus = save(tmp_path / "split.json", shipped("dummy_en.json"))
    monkeypatch.setenv(DTYPE_SWITCH, dtype)
    counted = []

    def counting(trainer, *args, **kwargs):
        with Waiting() as waiting:
            result = train(trainer, *args, **kwargs)
        counted.append(waiting.found)
        return result

    train = transformers.Trainer._inner_training_loop
    monkeypatch.setattr(transformers.Trainer, "_inner_training_loop", counting)
    for tokens, steps in ((1, 2), (1, 4), (4, 2), (4, 4)):
        done = run_here(
            TRAIN,
            *("--model_name_or_path", base, "--data_path", corpus, "--quantization", "8bit"),
            *("--output_dir", tmp_path / f"{tokens} {steps}", "--max_steps", steps),
            *("--model_max_length", 256, "--per_device_train_batch_size", tokens),
            *("--gradient_accumulation_steps", 2, "--save_strategy", "no"),
            *("--gradient_checkpointing", True),
        )
        assert done.returncode == 0, done.stderr
    for two, four in (counted[:2], counted[2:]):
        a_micro_batch, a_step = (A_MICRO_BATCH, A_STEP) if dtype == "float32" else IN_FP16
        expected = {who: 4 * times for who, times in a_micro_batch.items()}
        expected |= {who: 2 * times for who, times in a_step.items()}
        assert four - two == expected
