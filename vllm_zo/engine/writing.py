"""Sampling parameters and text of members that generate, as the engine's front end makes them for a client."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from vllm_zo.objectives.base import Generation, ScoringSequence


class Writing:
    """The sampling defaults, the end tokens and the detokeniser that the front end uses for a client's request.

    It has a tokenizer of its own: threads compute the rewards, while the front end may be using its tokenizer.
    """

    def __init__(self, model_config: ModelConfig) -> None:
        self._tokenizer = get_tokenizer(
            model_config.tokenizer,
            tokenizer_mode=model_config.tokenizer_mode,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        self._defaults = {**model_config.get_diff_sampling_param()}
        self._defaults.pop("max_tokens", None)  # the objective sets it for a member
        self._generation_config = model_config.try_get_generation_config()
        self._ends = frozenset(self._ended(SamplingParams()).all_stop_token_ids)

    def _ended(self, params: SamplingParams) -> SamplingParams:
        """Add the model's end tokens to `params`: its tokenizer's EOS, and those of its generation_config.json."""
        params.update_from_generation_config(self._generation_config, self._tokenizer.eos_token_id)
        return params

    def params(self, generation: Generation, seed: int, *, reads_prefix_cache: bool = False) -> SamplingParams:
        """Sampling parameters of a member's request; a setting that the objective leaves open has the model's default.

        Args:
            seed: the member's sampling seed; greedy decoding has no use for it.
            reads_prefix_cache: whether the KV of unperturbed weights is the member's too.
        """
        given = {"temperature": generation.temperature, "top_p": generation.top_p}
        sampling = {**self._defaults, **{name: value for name, value in given.items() if value is not None}}
        greedy = sampling.get("temperature") == 0.0
        return self._ended(
            SamplingParams(
                **sampling,
                max_tokens=generation.max_tokens,
                seed=None if greedy else seed,
                stop_token_ids=list(generation.stop_token_ids),
                detokenize=False,
                skip_reading_prefix_cache=not reads_prefix_cache,
            )
        )

    def text(self, continued: ScoringSequence, completion: Sequence[int]) -> str:
        """The text that a client would get for `completion`: decoded token by token, and cut off at a stop text.

        It holds neither the model's end token nor a character whose last bytes are missing.
        """
        assert continued.generation is not None
        request: Any = SimpleNamespace(  # the fields of a request that the detokeniser reads
            request_id="",
            prompt_token_ids=list(continued.token_ids),
            prompt_embeds=None,
            sampling_params=SamplingParams(stop=list(continued.generation.stop)),
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self._tokenizer, request)
        detokenizer.update(list(completion), stop_terminated=completion[-1] in self._ends)
        return str(detokenizer.get_next_output_text(finished=True, delta=False))
