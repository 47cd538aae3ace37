"""Presets: names that people know, each an ordinary recipe. The plan prints what a name expands to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`text` is the recipe, `about` one line for people, `source` where the meaning comes from.

    `calibrated`: the recipe that the name stands for when calibration text is at hand, where that is another.
    """

    text: str
    about: str
    source: str
    calibrated: str | None = None


PRESETS: dict[str, Preset] = {
    "w8": Preset("absmax@int8:g128,embed=int8:g128", "8 bits, hard to tell from the original", "this project"),
    "w4": Preset("search@int4:g32", "4.5 bits: the everyday choice", "this project", "qronos@int4:g32"),
    "w3": Preset(
        "search@uint3:g32:s=(uint6:g8):min=(int6:g8)",
        "3.5 bits, visibly worse without calibration",
        "this project",
        "qronos@uint3:g32:s=(uint6:g8):min=(int6:g8)",
    ),
    "w2": Preset(
        "search@uint2:g16:s=(uint4:g16):min=(int4:g16)",
        "2.6 bits, for experiments",
        "this project",
        "qronos@uint2:g16:s=(uint4:g16):min=(int4:g16)",
    ),
    "nl4": Preset("search@iq4nl:g32", "4.5 bits on 16 uneven levels", "llama.cpp IQ4_NL", "qronos@iq4nl:g32"),
    "awq": Preset("awq+search@int4:g64", "int4, channels scaled by what flows through them", "AWQ"),
    "gptq": Preset("gptq@int4:g64", "int4, errors made up for by the columns that follow", "GPTQ"),
    "smoothquant": Preset(
        "smooth+absmax@int8:channel,a=int8:token", "int8 weights and inputs, outliers moved into weights", "SmoothQuant"
    ),
    "w8a8": Preset("search@int8:channel,a=int8:g64", "int8 weights, inputs in int8 while running", "this project"),
    "w4a8": Preset(
        "search@int4:g32,a=int8:g64",
        "4.5-bit weights, inputs in int8 while running",
        "this project",
        "qronos@int4:g32,a=int8:g64",
    ),
    "absmax": Preset(
        "absmax@int8:tensor,embed=int8:tensor",
        "int8, one scale from the largest magnitude",
        "Naive Quantization Methods for LLMs",
    ),
    "zeropoint": Preset(
        "minmax@int8:tensor:zero=int32,embed=int8:tensor:zero=int32",
        "int8, min to max, rounded zero-point",
        "Naive Quantization Methods for LLMs",
    ),
    "minmax": Preset(
        "minmax@int8:tensor:zero=fp32,embed=int8:tensor:zero=fp32",
        "int8, min to max, unrounded zero-point",
        "Quantization in LLMs, a lab",
    ),
    "linear": Preset(
        "minmax@uint8:tensor:asym,embed=uint8:tensor:asym",
        "uint8 affine: lowest to 0, highest to 255",
        "5 Key Points to Unlock LLM Quantization",
    ),
    "symmetric": Preset("symmetric@int8:tensor,embed=int8:tensor", "int8, s = max|X| / 127.5", "LLMEasyQuant"),
    "per-channel": Preset("absmax@int8:channel", "int8, one scale a row", "LLM.int8; W8 of most tools"),
    "blockwise": Preset(
        "absmax@int8:*x128,embed=int8:*x128", "int8, one scale for 128 columns", "blockwise PTQ of tutorials"
    ),
    "groupwise": Preset("absmax@int4:g64", "int4, one scale for 64 weights of a row", "Q-BERT; ZeroQuant"),
    "zeroquant": Preset(
        "minmax@int8:g128:asym",
        "int8 groups whose zero is exact",
        "ZeroQuant; LLMEasyQuant",
        "minmax+lkd@int8:g128:asym,a=int8:token",
    ),
    "simquant": Preset("minmax@uint8:channel:zero=fp32", "uint8, min to max of each channel", "KVQuant; LLMEasyQuant"),
    "llm-int8": Preset(
        "absmax@int8:channel:narrow,a=int8:token:outliers=6",
        "int8 weights and inputs, columns of outliers in float",
        "LLM.int8",
    ),
    "kmeans": Preset("kmeans@kmeans4:channel", "16 learned levels for each row", "Deep Compression; SqueezeLLM"),
    "hqq": Preset("hqq@uint4:g64:zero=fp16", "uint4, zero-point by half-quadratic splitting", "HQQ"),
    "nf4": Preset("absmax@nf4:g64:s=(uint8:g256:s=fp32)", "normal-float levels, double-quantized scales", "QLoRA"),
    "fp8": Preset("absmax@e4m3:channel", "8-bit floats, one scale a row", "OCP FP8"),
    "mxfp4": Preset("mx@mxfp4", "4-bit floats, power-of-two scale for 32", "OCP MX"),
    "nvfp4": Preset("absmax@nvfp4", "4-bit floats, fp8 scale for 16", "NVIDIA NVFP4"),
}
