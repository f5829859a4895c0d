"""`python -m moe_jax.generate --workdir=DIR --prompt="..."`: text from the newest checkpoint of a run.

Several texts (more than one --prompt, a --prompts_file with one a line, or --num_samples of each) are generated
together; a single text is printed while it is generated. A text ends at the separator of documents, at the model's own
end-of-text tokens, at --eos=TOKEN, before a --stop string, which may contain names of special tokens, or after
--max_new_tokens. --temperature=0 takes the likeliest token; --top_k and --top_p restrict the draw to likely tokens. The
same --seed gives the same text, whichever other texts are generated with it.

--show_experts colours every token by its top expert in one MoE layer (--layer, the middle one by default);
--html=FILE writes a page with the same colours, in which the layer can be chosen.

No copy of a token is dropped, and the logits are those of the forward pass in training.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from moe_jax.config import Config, num_moe_layers
from moe_jax.config.command import fail, parse_flags
from moe_jax.config.paths import path_of, workdir_of
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import output_of
from moe_jax.runtime.memory import use_huge_pages
from moe_jax.runtime.workdir import config_of_run


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
    """The prompts of the flags, then those of the file, one a line.

    Raises:
        ValueError: there is no prompt, or the file cannot be read.
    """
    try:
        text = path_of(file, "--prompts_file").read_text(encoding="utf-8-sig") if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file={file} cannot be read ({error}); give a UTF-8 file.") from None
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines() would also split at other characters
    if not prompts and not lines:
        raise ValueError('there is no prompt; give --prompt="...", or --prompts_file=FILE with one a line.')
    return [*prompts, *lines]


def chosen_layer(config: Config, layer: int | None) -> int:
    """The MoE layer to show: `layer`, or the middle one.

    Raises:
        ValueError: there is no such layer.
    """
    layers = num_moe_layers(config.model) - config.model.mtp_depth
    if not config.model.num_experts:
        raise ValueError("--show_experts and --html need experts, and model.num_experts=0 has none; leave them out.")
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"--layer={layer} must be one of the MoE layers 0 to {layers - 1}; give one of them.")
    return layers // 2 if layer is None else layer


def run(flag: Any) -> None:
    """Restore the model, generate the texts and print them.

    Raises:
        ValueError, OSError: a flag is wrong, or something is missing in the workdir.
    """
    workdir = workdir_of(flag.workdir)
    prompts = read_prompts(flag.prompt, flag.prompts_file)
    # these load jax, which takes seconds: the mistakes above are reported before
    from moe_jax.text import printing
    from moe_jax.text.decoding import check_model, check_prompts, notice_of_drops
    from moe_jax.text.model import encode, known_length, restore, tokenizer_of
    from moe_jax.text.sampling import Sampling

    sampling = Sampling(flag.temperature, flag.top_k, flag.top_p)
    config = config_of_run(workdir)
    coloured = flag.show_experts or flag.html
    if flag.layer is not None and not coloured:
        raise ValueError(f"--layer={flag.layer} is for colours; add --show_experts or --html=FILE, or leave it out.")
    layer = chosen_layer(config, flag.layer) if coloured else 0
    if flag.html:
        output_of(flag.html, "--html")
    tokenizer, opened = tokenizer_of(workdir, config, flag.tokenizer, flag.eos)
    opened = opened if flag.separator is None else flag.separator
    prompt_ids = [encode(tokenizer, prompt, opened) for prompt in prompts for _ in range(flag.num_samples)]
    check_model(config, tokenizer)
    check_prompts(prompt_ids, flag.max_new_tokens, flag.stop, flag.max_length or known_length(workdir, config))
    model, step = restore(workdir)
    _note(f"{workdir}, step {step}; {notice_of_drops(config)}".rstrip("; "))
    options = dict(max_new_tokens=flag.max_new_tokens, sampling=sampling, stop=flag.stop)
    live = len(prompt_ids) == 1 and not flag.show_experts
    started = time.monotonic()
    shown = prompts[0] if live else None
    found = list(printing.completions(model, prompt_ids, tokenizer, flag.seed, flag.batch_size, options, shown))
    total = sum(len(completion.ids) for completion in found)
    seconds = time.monotonic() - started
    if not live and not flag.show_experts:
        printing.print_all([prompt for prompt in prompts for _ in range(flag.num_samples)], found)
    if coloured:
        printing.show_experts(model, prompt_ids, found, tokenizer, layer, flag)
        if flag.html:
            _note(f"wrote {flag.html}")
    _note(f"{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s")


def _note(line: str) -> None:
    """Print a line about the texts to standard error, separate from the texts."""
    print(line, file=sys.stderr, flush=True)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    use_huge_pages()
    keep_compiled()
    try:
        for name in ("num_samples", "batch_size"):
            if getattr(flag, name) < 1:
                raise ValueError(f"--{name}={getattr(flag, name)} must be at least 1; raise it.")
        run(flag)
    except (ValueError, OSError) as error:
        fail(str(error))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail("the texts need more memory than there is; lower --batch_size or --max_new_tokens.")


def define_flags(values: Any = flags.FLAGS) -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "workdir", None, "The workdir of a training run, or of a converted model.", flag_values=values, required=True
    )
    flags.DEFINE_multi_string("prompt", [], "The beginning of a text; may be given several times.", flag_values=values)
    flags.DEFINE_string("prompts_file", "", "A file of prompts, one a line.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "The largest number of tokens to add to a prompt.", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the likeliest token.", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw from this number of the likeliest tokens; 0: from all.", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "Draw from the likeliest tokens that together have this probability.", flag_values=values
    )
    # jax would use only the last 32 bits of a larger seed
    flags.DEFINE_integer("seed", 0, "The seed of the draws.", lower_bound=0, upper_bound=2**31 - 1, flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "End a text before this string; may be given several times.", flag_values=values
    )
    flags.DEFINE_integer("num_samples", 1, "Number of texts for each prompt.", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "Number of texts generated at the same time.", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", "", "bytes, or a folder with a tokenizer.json; the model's own if left out.", flag_values=values
    )
    flags.DEFINE_string("eos", "", "A further token, by name or id, that ends texts.", flag_values=values)
    flags.DEFINE_integer(
        "max_length",
        0,
        "The largest number of tokens of prompt and text; 0: the model's own limit.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "separator",
        None,
        "Whether prompts begin with the separator, as documents do; as in training if left out.",
        flag_values=values,
    )
    flags.DEFINE_bool("show_experts", False, "Colour tokens by their top expert.", flag_values=values)
    flags.DEFINE_integer(
        "layer", None, "The MoE layer to colour by, from 0; the middle one if left out.", flag_values=values
    )
    flags.DEFINE_string("html", "", "Write the coloured tokens of all layers to this file.", flag_values=values)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
