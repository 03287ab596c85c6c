"""`quantization_config=FourfoldConfig()` of Transformers' `from_pretrained`."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourfold.errors import QuantizationError
from fourfold.quantization.calibration import check_calibration
from fourfold.quantization.formats import BLOCK_SIZES, get_format
from fourfold.quantization.llm_int8 import DEFAULT_THRESHOLD, LLM_INT8

__all__ = ["QUANT_METHOD", "FourfoldConfig"]

QUANT_METHOD = "fourfold"


@register_quantization_config(QUANT_METHOD)
class FourfoldConfig(QuantizationConfigMixin):
    """How a model is quantized while it is loaded.

    Args:
        bnb_4bit_quant_type: A number format: "nf4", "fp4", "int4" or "int8"; "llm_int8" where `load_in_8bit` is given.
        bnb_4bit_use_double_quant: Quantize the scales to 8 bits.
        bnb_4bit_blocksize: Elements that share a scale.
        modules_to_not_convert: Names or globs of modules that stay in 16 bits, beside the output head.
        quantize_lm_head: Quantize the output head too. One that shares its weight with the embedding follows that.
        quantize_embeddings: Quantize the input embedding, and the output head that shares its weight.
        calibration: How scales of integer formats are chosen.
        load_in_8bit: LLM.int8(): rows in int8, inputs too, but for their outliers.
        llm_int8_threshold: From which magnitude a column of an input is an outlier; 0: none is.

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
        load_in_8bit: bool = False,
        llm_int8_threshold: float = DEFAULT_THRESHOLD,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise QuantizationError(
                "unknown option of FourfoldConfig",
                found=sorted(kwargs),
                allowed=FourfoldConfig.option_names(),
            )
        if load_in_8bit and bnb_4bit_quant_type == "nf4":
            bnb_4bit_quant_type = LLM_INT8.name
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
        self.llm_int8_threshold = llm_int8_threshold
        if load_in_8bit or self.load_in_8bit:
            self._check_8bit()
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
            "llm_int8_threshold",
        ]

    def _check_8bit(self) -> None:
        refused = {
            "bnb_4bit_quant_type": not self.load_in_8bit,
            "calibration": self.calibration != "absmax",
            "quantize_embeddings": self.quantize_embeddings,
        }
        for name, is_set in refused.items():
            if is_set:
                raise QuantizationError(
                    f"load_in_8bit is LLM.int8(), which has no {name}",
                    found=f"{name}={getattr(self, name)!r}",
                    allowed="load_in_8bit alone, or bnb_4bit_quant_type='int8' for blocks of int8",
                )
        if not self.llm_int8_threshold >= 0:
            raise QuantizationError(
                "llm_int8_threshold is out of range", found=self.llm_int8_threshold, allowed="0 or more"
            )

    @property
    def load_in_8bit(self) -> bool:
        """Whether it is LLM.int8(). No attribute, and in no dictionary of ours: Transformers takes those that have one
        for bitsandbytes'."""
        return self.bnb_4bit_quant_type == LLM_INT8.name

    def quantize_options(self) -> dict[str, Any]:
        """The keyword arguments of `quantize`."""
        if self.load_in_8bit:
            return {
                "format": self.bnb_4bit_quant_type,
                "double_quant": False,
                "outlier_threshold": self.llm_int8_threshold,
            }
        return {
            "format": self.bnb_4bit_quant_type,
            "block_size": self.bnb_4bit_blocksize,
            "double_quant": self.bnb_4bit_use_double_quant,
            "calibration": self.calibration,
        }

    def to_dict(self) -> dict[str, Any]:
        """What stands in a saved config.json: bitsandbytes' own entry wherever bitsandbytes can read the file."""
        if self.load_in_8bit:
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "llm_int8_threshold": self.llm_int8_threshold,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": self.modules_to_not_convert,
            }
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
        if entry.get("load_in_8bit"):
            return cls(
                load_in_8bit=True,
                llm_int8_threshold=float(entry.get("llm_int8_threshold", DEFAULT_THRESHOLD)),
                modules_to_not_convert=skipped,
                quantize_lm_head=skipped is not None,
            )
        return cls(
            bnb_4bit_quant_type=entry.get("bnb_4bit_quant_type", "fp4"),
            bnb_4bit_use_double_quant=entry.get("bnb_4bit_use_double_quant", False),
            modules_to_not_convert=skipped,
            # bitsandbytes leaves out the output head by itself only where nothing is listed.
            quantize_lm_head=skipped is not None,
        )
