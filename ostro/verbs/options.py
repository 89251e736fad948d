"""Arguments that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A checkpoint of any format, or a run directory.")]
ModelOrRecipe = Annotated[
    str, typer.Argument(help="A checkpoint of any format, a run directory, or a recipe with weights.path.")
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="v1, v3, a .model, a tokenizer.json, or a folder.")
]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16, fp32, or nf4: 4 bits.")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="A folder of PEFT's, or a LoRA run: goes into the model.")
]
