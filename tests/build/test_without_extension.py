"""The package works without mmadapt._C, and says so; with it, it says what it runs."""

import io
import os
import subprocess
import sys

import torch

import mmadapt
from mmadapt._extension import load_extension

CODE = """
import torch
import mmadapt
from mmadapt.ops import swiglu_adapter

config = mmadapt.show_config()
assert config["extension"].startswith("absent: switched off by MMADAPT_DISABLE_EXT=1"), config
x = torch.randn(5, 8, requires_grad=True)
gate, down, up = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, 3)
swiglu_adapter(x, gate, down, up).sum().backward()
assert x.grad.isfinite().all()
print(mmadapt.explain("swiglu_adapter", x, gate, down, up))
"""


def test_reference_serves_when_the_extension_is_off():
    environment = {**os.environ, "MMADAPT_DISABLE_EXT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "swiglu_adapter: reference" in result.stdout
    assert "MMADAPT_DISABLE_EXT" in result.stdout.split("swiglu_adapter: reference")[1]


def test_show_config_prints_what_it_returns():
    printed = io.StringIO()
    config = mmadapt.show_config(printed)
    lines = printed.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == list(config)
    assert all(line.endswith(value) for line, value in zip(lines, config.values(), strict=True))
    assert config["torch"].startswith(torch.__version__)
    assert ("isa" in config) == (load_extension()[0] is not None)


def test_import_is_light():
    code = "import sys, mmadapt; heavy = {'transformers', 'peft', 'triton', 'pydantic'}; "
    code += "import mmadapt.ops; print(sorted(heavy & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
