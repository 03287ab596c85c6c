"""Number formats, blockwise and double quantization, calibration, QuantizedLinear, the Transformers quantizer."""
