"""Published weights in and out: `load_hf(folder)` and `save_hf(workdir, folder)`."""

from moe_jax.huggingface.model import LanguageModel, load_hf, save_hf

__all__ = ["LanguageModel", "load_hf", "save_hf"]
