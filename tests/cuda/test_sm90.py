"""The check of compiled kernels sees spills, stack and the lack of wgmma; toy kernels, no GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("cuda_sm90", Path(__file__).with_name("sm90.py"))
sm90 = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = sm90
spec.loader.exec_module(sm90)

needs_nvcc = pytest.mark.skipif(sm90.nvcc() is None, reason="needs nvcc")
REPORT = sm90.ROOT / "csrc" / "cuda" / "ptxas_report.py"

CLEAN = "__global__ void clean(float *x) { x[threadIdx.x] *= 2.f; }"
# Indexed at run time, so that it cannot live in registers.
STACK = """__global__ void stack(float *x, int n) {
  float buffer[64];
  for (int i = 0; i < n; ++i) buffer[i * 7 % 64] = x[i];
  x[0] = buffer[n];
}"""
WGMMA = """#include <cstdint>
__global__ void product(float *x, uint64_t a, uint64_t b) {
  float d[4] = {x[0], x[1], x[2], x[3]};
  asm volatile("wgmma.fence.sync.aligned;\\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;\\n"
               "wgmma.commit_group.sync.aligned;\\nwgmma.wait_group.sync.aligned 0;\\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}"""


def compile_toy(folder, code, mode="report"):
    source, output = folder / "toy.cu", folder / "toy.cu.o"
    source.write_text(code)
    command = [sys.executable, REPORT, mode, sm90.nvcc(), "-Xptxas=-v"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-c", source, "-o", output]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return result, output


@needs_nvcc
def test_a_clean_kernel(tmp_path):
    result, output = compile_toy(tmp_path, CLEAN, "error")
    assert result.returncode == 0 and "ptxas" not in result.stderr
    (kernel,) = sm90.kernels([output])
    assert kernel.fault is None and kernel.usage.registers > 0
    assert kernel.usage.architecture == "sm_90a"
    assert sm90.plain(kernel.usage.function) == "clean"


@needs_nvcc
def test_stack_is_a_fault_and_an_error_where_asked(tmp_path):
    result, output = compile_toy(tmp_path, STACK)
    assert result.returncode == 0 and "report: _Z5stackPfi for sm_90a: 256 bytes" in result.stderr
    (kernel,) = sm90.kernels([output])
    assert "toy.cu: stack for sm_90a: 256 bytes of stack" in kernel.fault
    result, output = compile_toy(tmp_path, STACK, "error")
    assert result.returncode == 1 and not output.exists()


@needs_nvcc
def test_compiler_errors_pass_through(tmp_path):
    result, output = compile_toy(tmp_path, "__global__ void broken(float *x) { y[0] = 1; }")
    assert result.returncode != 0 and "identifier" in result.stderr and not output.exists()


@needs_nvcc
@pytest.mark.skipif(sm90.cuobjdump() is None, reason="needs triton's cuobjdump")
def test_wgmma_is_looked_for_in_machine_code(tmp_path):
    for code, expected in ((WGMMA, True), (CLEAN, False)):
        result, output = compile_toy(tmp_path, code)
        assert result.returncode == 0, result.stderr
        assert sm90.has_wgmma(output, sm90.cuobjdump()) == expected


def test_which_sources_should_hold_wgmma(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sm90, "ROOT", tmp_path)
    (folder / "a_sm90.cu").write_text(WGMMA)
    (folder / "b_sm90.cu").write_text(f"// sm90: no wgmma, it copies\n{CLEAN}")
    names = ("a_sm90.cu.o", "b_sm90.cu.o", "portable.cu.o")
    assert [sm90.means_wgmma(tmp_path / name) for name in names] == [True, False, False]


def test_reports_with_several_architectures():
    text = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers"""
    clean, spilled = sm90.ptxas_report.parse(text)
    assert clean == ("_Z1kPf", "sm_80", 32, 0, 0, 0) and clean.clean
    assert spilled == ("_Z1kPf", "sm_90a", 255, 16, 8, 12) and not spilled.clean


def test_names():
    inner = "_ZN7mmadapt47_GLOBAL__N__1673cacc_14_ordered_sum_cu_a0bd57b718ordered_sum_kernelEPKh"
    assert sm90.plain(inner) == "ordered_sum_kernel"


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sm90, "nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sm90.py"])
    assert sm90.main() == 0
    assert "skipped: no nvcc here" in capsys.readouterr().out


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_of_the_project(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sm90.py"])
    assert sm90.main() == 0
