"""The interface of the lm-evaluation-harness on our models."""

import functools
from collections.abc import Sequence
from typing import Any

from moe_jax.config.paths import workdir_of
from moe_jax.text.answers import batches, check, likelihoods, open_reader, pair, rolling, until

TOGETHER = 32  # documents whose windows share batches


class Adapter:
    """A workdir's model behind the methods of the harness's `LM`, which `adapter` adds as a base class.

    tasks: the tasks to be run, if they are known: no request is answered if one of theirs cannot be.
    """

    cache_hook: Any  # of `LM`

    def __init__(
        self,
        workdir: str,
        tokenizer: str = "",
        max_length: int = 0,
        batch_size: int = 8,
        eos: str = "",
        **others: Any,
    ) -> None:
        """Args: others: what the harness itself adds, `max_batch_size` and `device`."""
        super().__init__()
        if unknown := {name for name, value in others.items() if value is not None} - {"max_batch_size", "device"}:
            raise ValueError(f"model_args has {', '.join(sorted(unknown))}, which moe_jax does not know; remove it.")
        self.reader = open_reader(workdir_of(workdir), tokenizer, int(max_length), int(batch_size), str(eos))
        self.tasks: Sequence[Any] = ()
        self._checked = False

    @property
    def max_length(self) -> int:
        """The most tokens that the model sees at a time."""
        return self.reader.max_length

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name."""
        return self.reader.tokenizer.name

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `likelihoods`, of (context, continuation) as texts."""
        self._check(requests)
        pairs = [pair(self.reader, *request.args[:2]) for request in requests]
        return self._cached(requests, likelihoods(self.reader, pairs))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As `rolling`, with a progress bar."""
        from tqdm import tqdm

        self._check(requests)
        texts = [request.args[0] for request in requests]
        found: list[float] = []
        for part in tqdm(list(batches(range(len(texts)), TOGETHER)), desc="documents", disable=disable_tqdm):
            found += rolling(self.reader, [texts[n] for n in part])
        return self._cached(requests, found)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As `until`."""
        self._check(requests)
        return self._cached(requests, until(self.reader, [request.args for request in requests]))

    def _check(self, requests: Any) -> None:
        """Check before the first answer; by then the harness has built the requests of all tasks."""
        if not self._checked:
            check(self.reader, [one for task in self.tasks for one in task.instances] or requests)
        self._checked = bool(self.tasks)

    def _cached(self, requests: Sequence[Any], found: list[Any]) -> list[Any]:
        """The answers, after adding them to the harness's cache."""
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(request.request_type, request.args, answer)
        return found


@functools.cache  # the harness allows a name to be registered once
def adapter() -> Any:
    """The class of our models for the harness, registered as "moe_jax".

    Raises:
        ValueError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ValueError(
            f"the lm-evaluation-harness is not installed ({error}); pip install 'moe_jax[lm-eval]'."
        ) from None

    class MoeJax(Adapter, LM):
        """Our models for the harness."""

    return register_model("moe_jax")(MoeJax)
