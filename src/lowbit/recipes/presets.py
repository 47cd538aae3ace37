"""Presets: names that people know, each an ordinary recipe. The plan prints what a name expands to.

What is said of losses was measured on a model of 135 M parameters, which minds few bits more than large models do; `docs/quality.md`
and `benchmarks/results/` have the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

START, FOUR, EIGHT = "start here", "4 bits and fewer", "8 bits"
TEXT, FLOAT = "with calibration text", "floats and formats of hardware"
LEARN = "from the literature, for learning"
GROUPS = (START, FOUR, EIGHT, TEXT, FLOAT, LEARN)


@dataclass(frozen=True)
class Preset:
    """A recipe with a name, and what people want to know of it before they take it.

    text: the recipe. group: one of `GROUPS`, what it is for. about: how many bits it takes and what is special. when: a sentence
    that says when to take it, and what it loses by the project's own measurements. source: where the meaning comes from.
    calibrated: the recipe that the name stands for when calibration text is at hand, where that is another.
    """

    text: str
    group: str
    about: str
    when: str
    source: str
    calibrated: str | None = None


PRESETS: dict[str, Preset] = {
    "w4": Preset(
        text="search@int4:g32",
        group=START,
        about="4.5 bits in the linear layers, 8 in the embedding",
        when="Start with this one. It is calibrated, which takes away about two thirds of the loss at the same size; --data-free does without.",
        source="this project",
        calibrated="qronos@int4:g32",
    ),
    "w8": Preset(
        text="absmax@int8:g128,embed=int8:g128",
        group=START,
        about="8.1 bits everywhere",
        when="Take this one where 8 bits fit: in every measurement here the result could not be told from the original.",
        source="this project",
    ),
    "nl4": Preset(
        text="search@iq4nl:g32",
        group=FOUR,
        about="4.5 bits in the linear layers, 8 in the embedding, on 16 levels that are closer together near zero",
        when="Take it in place of w4 for lowbit itself or for GGUF: at the same size it loses about a quarter less.",
        source="llama.cpp IQ4_NL",
        calibrated="qronos@iq4nl:g32",
    ),
    "w4a8": Preset(
        text="search@int4:g32,a=int8:g64",
        group=FOUR,
        about="4.5 bits in the linear layers, 8 in the embedding, and 8-bit inputs while the model runs",
        when="Take it where long prompts must be read fast at the size of w4; its 8-bit inputs add little to the loss of w4.",
        source="this project",
        calibrated="qronos@int4:g32,a=int8:g64",
    ),
    "hqq": Preset(
        text="hqq@uint4:g64:zero=fp16",
        group=FOUR,
        about="4.5 bits in the linear layers, 8 in the embedding; zero-points are chosen so that large errors stay few",
        when="Take it to reproduce HQQ, which needs no text; w4 has the same size and lost less here.",
        source="HQQ",
    ),
    "w3": Preset(
        text="search@uint3:g32:s=(uint6:g8):min=(int6:g8)",
        group=FOUR,
        about="3.5 bits in the linear layers, 8 in the embedding",
        when="Take it where 4 bits are too many, and only with --calibration: without text a small model is damaged.",
        source="this project",
        calibrated="qronos@uint3:g32:s=(uint6:g8):min=(int6:g8)",
    ),
    "w2": Preset(
        text="search@uint2:g16:s=(uint4:g16):min=(int4:g16)",
        group=FOUR,
        about="2.6 bits in the linear layers, 8 in the embedding",
        when="Take it for experiments only: a small model is destroyed without calibration text, and at this size still damaged with it.",
        source="this project",
        calibrated="qronos@uint2:g16:s=(uint4:g16):min=(int4:g16)",
    ),
    "w8a8": Preset(
        text="search@int8:channel,a=int8:g64",
        group=EIGHT,
        about="8 bits for the weights and, while the model runs, for their inputs, where 64 channels of a token share a scale",
        when="Take it where long prompts must be read fast: it multiplies integers with integers, and stays very close to the original.",
        source="this project",
    ),
    "per-channel": Preset(
        text="absmax@int8:channel",
        group=EIGHT,
        about="8 bits with one scale for each row of a weight",
        when="Take it for programs that want one scale for each row, such as vLLM; its result could not be told from the original.",
        source="LLM.int8; W8 of most tools",
    ),
    "gptq": Preset(
        text="gptq@int4:g64",
        group=TEXT,
        about="4.25 bits in the linear layers, 8 in the embedding; columns that are rounded later make up for the errors of earlier ones",
        when="Take it to reproduce the GPTQ paper; with groups of 32, w4 with text lost a third less than GPTQ did here.",
        source="GPTQ",
    ),
    "awq": Preset(
        text="awq+search@int4:g64",
        group=TEXT,
        about="4.25 bits in the linear layers, 8 in the embedding; channels that carry large inputs are scaled up before they are rounded",
        when="Take it to reproduce the AWQ paper; it was not measured here, so compare it with w4 on your own model first.",
        source="AWQ",
    ),
    "smoothquant": Preset(
        text="smooth+absmax@int8:channel,a=int8:token",
        group=TEXT,
        about="8 bits for the weights and their inputs; outliers of the inputs are moved into the weights first",
        when="Take it to reproduce the SmoothQuant paper; it was not measured here, but w8a8 was, which has 8-bit inputs too.",
        source="SmoothQuant",
    ),
    "fp8": Preset(
        text="absmax@e4m3:channel",
        group=FLOAT,
        about="8-bit floats with one scale for each row",
        when="Take it for programs and hardware that multiply fp8; 8-bit integers lose less at the same size.",
        source="OCP FP8",
    ),
    "nf4": Preset(
        text="absmax@nf4:g64:s=(uint8:g256:s=fp32)",
        group=FLOAT,
        about="4.1 bits in the linear layers, 8 in the embedding, on the 16 levels of QLoRA; the scales are quantized too",
        when="Take it where w4 is a little too large: without text its loss is close to that of w4.",
        source="QLoRA",
    ),
    "nvfp4": Preset(
        text="absmax@nvfp4",
        group=FLOAT,
        about="4-bit floats with an 8-bit float scale for every 16 weights: 4.5 bits in the linear layers, 8 in the embedding",
        when="Take it for programs and hardware that read NVFP4; without text it lost about as much as w4.",
        source="NVIDIA NVFP4",
    ),
    "mxfp4": Preset(
        text="mx@mxfp4",
        group=FLOAT,
        about="4-bit floats with a power of two as the scale of every 32 weights: 4.25 bits in the linear layers, 8 in the embedding",
        when="Take it for programs and hardware that read MXFP4; a small model was damaged by it.",
        source="OCP MX",
    ),
    "absmax": Preset(
        text="absmax@int8:tensor,embed=int8:tensor",
        group=LEARN,
        about="8 bits with one scale for a whole tensor, from its largest magnitude",
        when="Take it to learn how quantization works; w8 loses about a thirtieth as much.",
        source="Naive Quantization Methods for LLMs",
    ),
    "zeropoint": Preset(
        text="minmax@int8:tensor:zero=int32,embed=int8:tensor:zero=int32",
        group=LEARN,
        about="8 bits for the range of a whole tensor, from its lowest value to its highest; zero is exactly a level",
        when="Take it to learn what a zero-point is; w8 loses less than a twentieth as much.",
        source="Naive Quantization Methods for LLMs",
    ),
    "minmax": Preset(
        text="minmax@int8:tensor:zero=fp32,embed=int8:tensor:zero=fp32",
        group=LEARN,
        about="8 bits for the range of a whole tensor, from its lowest value to its highest; zero lies between two levels",
        when="Take it to learn what rounding a zero-point changes, by comparing it with `zeropoint`; here they lost almost the same.",
        source="Quantization in LLMs, a lab",
    ),
    "linear": Preset(
        text="minmax@uint8:tensor:asym,embed=uint8:tensor:asym",
        group=LEARN,
        about="8 bits for the range of a whole tensor; its lowest value becomes level 0 and its highest level 255",
        when="Take it to learn that signed and unsigned levels are the same thing: it loses the same as `zeropoint`.",
        source="5 Key Points to Unlock LLM Quantization",
    ),
    "symmetric": Preset(
        text="symmetric@int8:tensor,embed=int8:tensor",
        group=LEARN,
        about="8 bits with one scale for a whole tensor, max|x| / 127.5, which uses the level -128 too",
        when="Take it to compare with `absmax`, which leaves -128 out; here they lost about the same.",
        source="LLMEasyQuant",
    ),
    "blockwise": Preset(
        text="absmax@int8:*x128,embed=int8:*x128",
        group=LEARN,
        about="8 bits with one scale for every 128 columns, shared by all rows",
        when="Take it to learn what smaller blocks bring: it loses less than `absmax` and much more than one scale for each row.",
        source="blockwise PTQ of tutorials",
    ),
    "groupwise": Preset(
        text="absmax@int4:g64",
        group=LEARN,
        about="4.25 bits in the linear layers, 8 in the embedding, where the largest magnitude of 64 weights gives their scale",
        when="Take it to see what 4 bits cost without a search for good scales: a small model was damaged.",
        source="Q-BERT; ZeroQuant",
    ),
    "zeroquant": Preset(
        text="minmax@int8:g128:asym",
        group=LEARN,
        about="8.2 bits in the linear layers, 8 in the embedding, for the range of 128 weights, from the lowest to the highest",
        when="Take it to reproduce ZeroQuant, which with text also trains the layers; without text its result could not be told from the original.",
        source="ZeroQuant; LLMEasyQuant",
        calibrated="minmax+lkd@int8:g128:asym,a=int8:token",
    ),
    "simquant": Preset(
        text="minmax@uint8:channel:zero=fp32",
        group=LEARN,
        about="8 bits for the range of each row, from its lowest value to its highest",
        when="Take it to compare with `per-channel`, whose ranges are symmetric around zero: neither could be told from the original.",
        source="KVQuant; LLMEasyQuant",
    ),
    "llm-int8": Preset(
        text="absmax@int8:channel:narrow,a=int8:token:outliers=6",
        group=LEARN,
        about="8 bits for the weights and their inputs, except for columns with large inputs, which stay float",
        when="Take it to reproduce LLM.int8; w8a8, where 64 channels of the inputs share a scale, lost less than half as much.",
        source="LLM.int8",
    ),
    "kmeans": Preset(
        text="kmeans@kmeans4:channel",
        group=LEARN,
        about="4 bits and 16 learned levels for each row in the linear layers, 8 bits in the embedding",
        when="Take it to learn what a row gains from levels of its own; without text nl4, which is a little larger, lost a third less.",
        source="Deep Compression; SqueezeLLM",
    ),
}
