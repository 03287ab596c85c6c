"""A checkpoint is quantized tensor by tensor: the 16-bit model is at no moment in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = """
import json, sys, threading, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fourfold import FourfoldConfig, QuantizedLinear, quantize


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


# Whatever is imported or set up on first use is not the model's.
quantize(torch.ones(64, 64)).dequantize()
peak, running = 0, True


def sample() -> None:
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)


before = anonymous()
thread = threading.Thread(target=sample)
thread.start()
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=FourfoldConfig(), dtype=torch.bfloat16, device_map="cpu"
)
running = False
thread.join()
held = sum(layer.quantized.num_bytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
held += sum(parameter.nbytes for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
print(json.dumps({"peak": peak - before, "after": anonymous() - before, "held": held}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_peak_while_loading_is_the_quantized_model_and_a_few_tensors(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=9,
                num_attention_heads=8,
                num_key_value_heads=8,
                vocab_size=1000,
                dtype=torch.bfloat16,
            )
        ).to(torch.bfloat16)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    tensor_bytes = max(parameter.nbytes for parameter in model.parameters())
    assert dense_bytes > 300e6
    model.save_pretrained(tmp_path)
    del model
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout.splitlines()[-1])
    # Transformers reads a few tensors ahead.
    assert memory["peak"] < memory["held"] + 8 * tensor_bytes, memory
    assert memory["peak"] < 0.6 * dense_bytes, memory
