"""Published weights in, params out; flows as the distributions of other libraries."""

from jflow._core.names import explain_unknown
from jflow.convert._adm import adm, adm_layout
from jflow.convert._autoencoder_kl import (
    autoencoder_kl,
    autoencoder_kl_diffusers_layout,
    autoencoder_kl_layout,
)
from jflow.convert._ddpmpp import ddpmpp, ddpmpp_layout
from jflow.convert._dit import dit, dit_diffusers_layout, dit_layout
from jflow.convert._inception import inception
from jflow.convert._layouts import LINEAR, SAME, Constant, Layout, Transform, Weight, load, save
from jflow.convert._lightning_dit import lightning_dit, lightning_dit_layout
from jflow.convert._lora import lora, save_lora
from jflow.convert._mmdit import (
    flux,
    flux_diffusers_layout,
    flux_layout,
    mmdit,
    mmdit_diffusers_layout,
    mmdit_layout,
)
from jflow.convert._numpyro import to_numpyro
from jflow.convert._pipeline import Pipeline, load_pipeline
from jflow.convert._safetensors import read_safetensors, write_safetensors
from jflow.convert._tarflow import tarflow, tarflow_layout
from jflow.convert._text import clip_text, clip_text_layout, t5_encoder, t5_encoder_layout
from jflow.convert._tokenizer import Tokenizer, tokenizer
from jflow.convert._uvit import uvit, uvit_layout

__all__ = [
    "Constant",
    "LINEAR",
    "Layout",
    "Pipeline",
    "SAME",
    "Tokenizer",
    "Transform",
    "Weight",
    "adm",
    "adm_layout",
    "autoencoder_kl",
    "autoencoder_kl_diffusers_layout",
    "autoencoder_kl_layout",
    "clip_text",
    "clip_text_layout",
    "ddpmpp",
    "ddpmpp_layout",
    "dit",
    "dit_diffusers_layout",
    "dit_layout",
    "flux",
    "flux_diffusers_layout",
    "flux_layout",
    "inception",
    "lightning_dit",
    "lightning_dit_layout",
    "load",
    "load_pipeline",
    "lora",
    "mmdit",
    "mmdit_diffusers_layout",
    "mmdit_layout",
    "read_safetensors",
    "save",
    "save_lora",
    "t5_encoder",
    "t5_encoder_layout",
    "tarflow",
    "tarflow_layout",
    "to_numpyro",
    "tokenizer",
    "uvit",
    "uvit_layout",
    "write_safetensors",
]

explain_unknown(__name__)
