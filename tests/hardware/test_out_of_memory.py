"""Which errors say that memory ran out, as torch words them on a card."""

import pytest
import torch

from llama_lora.cli import one_line_errors, out_of_memory

# What the CUDA runtime's errors end with.
ELSEWHERE = (
    "Search for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for "
    "more information.\nCUDA kernel errors might be asynchronously reported at some other API "
    "call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1"
)
LACKING = {
    "tensor": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "runtime": torch.AcceleratorError(f"CUDA error: out of memory\n{ELSEWHERE}"),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(h)`"),
    "cuBLASLt": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasLtMatmul with transpose_mat1 1"
    ),
    "cuBLAS handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuBLASLt handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(handle)`"
    ),
}
OTHERS = {
    "address": torch.AcceleratorError(
        f"CUDA error: an illegal memory access was encountered\n{ELSEWHERE}"
    ),
    "assert": torch.AcceleratorError(f"CUDA error: device-side assert triggered\n{ELSEWHERE}"),
    "kernel": torch.AcceleratorError("CUDA error: no kernel image is available for execution"),
    "driver": RuntimeError("CUDA driver error: invalid argument"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "product": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "file": OSError("CUDA error: out of memory"),
}


@pytest.mark.parametrize("error", LACKING.values(), ids=LACKING.keys())
def test_lack_of_memory_is_known_however_it_is_worded(error):
    assert out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS.keys())
def test_other_failures_are_not_lack_of_memory(error):
    assert not out_of_memory(error)


@pytest.mark.parametrize("kind", LACKING)
def test_a_script_ends_in_one_line(kind, capsys):
    @one_line_errors
    def main():
        raise LACKING[kind]

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory on the card: CUDA")


@pytest.mark.parametrize("error", [OTHERS["address"], OTHERS["shapes"]], ids=["address", "shapes"])
def test_a_fault_of_ours_keeps_its_traceback(error):
    @one_line_errors
    def main():
        raise error

    with pytest.raises(RuntimeError) as found:
        main()
    assert found.value is error
