"""`quantization_config=FourfoldConfig()` of Transformers' `from_pretrained`."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourfold.errors import QuantizationError
from fourfold.quantization.calibration import check_calibration
from fourfold.quantization.formats import BLOCK_SIZES, get_format

__all__ = ["QUANT_METHOD", "FourfoldConfig"]

QUANT_METHOD = "fourfold"


@register_quantization_config(QUANT_METHOD)
class FourfoldConfig(QuantizationConfigMixin):
    """How a model is quantized while it is loaded.

    Args:
        bnb_4bit_quant_type: A number format: "nf4", "fp4", "int4" or "int8".
        bnb_4bit_use_double_quant: Quantize the scales to 8 bits.
        bnb_4bit_blocksize: Elements that share a scale.
        modules_to_not_convert: Names or globs of modules that stay in 16 bits, beside the output head.
        quantize_lm_head: Quantize the output head too. One that shares its weight with the embedding follows that.
        quantize_embeddings: Quantize the input embedding, and the output head that shares its weight.
        calibration: How scales of integer formats are chosen.

    Raises:
        QuantizationError: An option that is not allowed.
    """

    def __init__(
        self,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_blocksize: int = 64,
        modules_to_not_convert: list[str] | None = None,
        quantize_lm_head: bool = False,
        quantize_embeddings: bool = False,
        calibration: str = "absmax",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise QuantizationError(
                "unknown option of FourfoldConfig",
                found=sorted(kwargs),
                allowed=FourfoldConfig.option_names(),
            )
        number_format = get_format(bnb_4bit_quant_type)
        check_calibration(calibration, number_format)
        if bnb_4bit_blocksize not in BLOCK_SIZES:
            raise QuantizationError("unsupported block size", found=bnb_4bit_blocksize, allowed=BLOCK_SIZES)
        self.quant_method = QUANT_METHOD
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_blocksize = bnb_4bit_blocksize
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.quantize_lm_head = quantize_lm_head
        self.quantize_embeddings = quantize_embeddings
        self.calibration = calibration
        # Set by the quantizer when a file of this model needs us to be read: bitsandbytes has no such modules.
        self.has_quantized_experts = False

    @staticmethod
    def option_names() -> list[str]:
        return [
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_blocksize",
            "modules_to_not_convert",
            "quantize_lm_head",
            "quantize_embeddings",
            "calibration",
        ]

    def quantize_options(self) -> dict[str, Any]:
        """The keyword arguments of `quantize`."""
        return {
            "format": self.bnb_4bit_quant_type,
            "block_size": self.bnb_4bit_blocksize,
            "double_quant": self.bnb_4bit_use_double_quant,
            "calibration": self.calibration,
        }

    def to_dict(self) -> dict[str, Any]:
        """What stands in a saved config.json: bitsandbytes' own entry wherever bitsandbytes can read the file."""
        is_known = self.bnb_4bit_quant_type in ("nf4", "fp4")
        if is_known and not self.has_quantized_experts and not self.quantize_embeddings:
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                # Without a list bitsandbytes leaves out the output head, which may be quantized here.
                "llm_int8_skip_modules": self.modules_to_not_convert,
            }
        return {"quant_method": QUANT_METHOD, **{name: getattr(self, name) for name in self.option_names()}}

    @classmethod
    def from_bitsandbytes(cls, entry: dict[str, Any]) -> FourfoldConfig:
        """The configuration that reads a checkpoint whose config.json holds bitsandbytes' `entry`."""
        skipped = entry.get("llm_int8_skip_modules")
        return cls(
            bnb_4bit_quant_type=entry.get("bnb_4bit_quant_type", "fp4"),
            bnb_4bit_use_double_quant=entry.get("bnb_4bit_use_double_quant", False),
            modules_to_not_convert=skipped,
            # bitsandbytes leaves out the output head by itself only where nothing is listed.
            quantize_lm_head=skipped is not None,
        )
