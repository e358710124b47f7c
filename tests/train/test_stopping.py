"""A run in fp16 that skips every step ends, whatever the optimizer; not one that skips a few."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from llama_lora.train.stopping import MOST_SKIPPED, Diverged, OverflowGuard

STATE = SimpleNamespace(global_step=7)


def steps(overflow: OverflowGuard, scaler, optimizer, parameter, gradients) -> None:
    """A step for each gradient, with what the Trainer does around it."""
    for gradient in gradients:
        optimizer.zero_grad()
        scaler.scale((parameter * gradient).sum()).backward()
        optimizer.step()
        overflow.on_step_end(None, STATE, None)


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_that_skips_every_step_ends(fused):
    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = AcceleratedOptimizer(
        torch.optim.AdamW([parameter], fused=fused), device_placement=False, scaler=scaler
    )
    overflow = OverflowGuard(SimpleNamespace(scaler=scaler))
    overflow.on_train_begin(None, STATE, None)
    some = [1.0, torch.inf, 1.0] * MOST_SKIPPED
    steps(overflow, scaler, optimizer, parameter, some)
    assert overflow.in_a_row == 0
    before = parameter.detach().clone()
    scaler.update(2.0**16)
    overflow.on_train_begin(None, STATE, None)
    steps(overflow, scaler, optimizer, parameter, [torch.inf] * (MOST_SKIPPED - 1))
    with pytest.raises(Diverged, match=f"{MOST_SKIPPED} steps in a row"):
        steps(overflow, scaler, optimizer, parameter, [torch.inf])
    assert torch.equal(parameter, before)
    assert scaler.get_scale() > 0


def test_deepspeed_tells_by_itself():
    overflow = OverflowGuard(SimpleNamespace(optimizer_step_was_skipped=True))
    for _ in range(MOST_SKIPPED - 1):
        overflow.on_step_end(None, STATE, None)
    with pytest.raises(Diverged):
        overflow.on_step_end(None, STATE, None)
