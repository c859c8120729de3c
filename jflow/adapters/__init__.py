"""Adapters: a small change of a trained model, which is trained in its place.

`wrap` gives a model with an `Adapter` over params {'base', 'adapter'}, and `adapter_loss` trains
the adapter alone, with any loss of jflow and the base in frozen['base'].
"""

from jflow._core.names import explain_unknown
from jflow.adapters._activations import adaptformer
from jflow.adapters._adapter import adapter_loss, combine, merge, wrap
from jflow.adapters._forms import layerwise, on_modules, on_weights
from jflow.adapters._k_adapter import k_adapter
from jflow.adapters._lora import lora, lora_activations
from jflow.adapters._mixtures import hyper_adapter, mera, mixture_of_adapters
from jflow.adapters._quantize import dequantize, quantize
from jflow.adapters._weights import adapter_bias, ether, ether_plus, hydra, oft

__all__ = [
    "adapter_bias",
    "adapter_loss",
    "adaptformer",
    "combine",
    "dequantize",
    "ether",
    "ether_plus",
    "hydra",
    "hyper_adapter",
    "k_adapter",
    "layerwise",
    "lora",
    "lora_activations",
    "mera",
    "merge",
    "mixture_of_adapters",
    "oft",
    "on_modules",
    "on_weights",
    "quantize",
    "wrap",
]

explain_unknown(__name__)
