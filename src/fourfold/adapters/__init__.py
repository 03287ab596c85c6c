"""LoRA over QuantizedLinear, registered with PEFT through its custom-module dispatch."""
