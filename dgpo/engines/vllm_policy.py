"""vLLM's asynchronous engine as an episode `Policy`: token ids in, sampled token ids and their log-probs out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dgpo.agent.episode import Generation
from dgpo.config.schema import HardwareConfig
from dgpo.engines.environment import export_environment
from dgpo.engines.turn_sampling import sampling_arguments
from dgpo.engines.vllm_patches import run_in_process
from dgpo.errors import DgpoError, one_line

REAP_TIMEOUT_S = 5.0
FIXED = "dgpo.engines.vllm_patches.EngineWorker"
REPLACEABLE = "dgpo.engines.vllm_patches.ReloadableEngineWorker"


class VllmPolicy:
    """One vLLM engine with one model. Use as `async with VllmPolicy(...) as policy`.

    Args:
        model_path: Hugging Face folder or hub name; its tokenizer only detokenises here, to find stop strings.
        hardware: `hardware.engine` sizes the engine, `hardware.env` is exported before vllm is imported.
        max_model_len: longest sequence in tokens, prompt and response together.
        temperature: 0 decodes greedily.
        seed: of the engine; a request that brings its own seed does not depend on it.
        log_probs: whether they are wanted; they take a tenth of the time or more with a small model.
        replaceable_weights: whether `load_weights` will be called; large models on a CPU are slower with it.

    Attributes:
        on_text: where it is set, called with (request id, new text) while a turn is being written.

    The log-probs are the model's own (before temperature), in nats, one per sampled token.
    """

    def __init__(
        self,
        model_path: str,
        *,
        hardware: HardwareConfig,
        max_model_len: int,
        temperature: float,
        seed: int,
        trust_remote_code: bool = False,
        log_probs: bool = True,
        replaceable_weights: bool = False,
    ) -> None:
        self.model_path = model_path
        self.hardware = hardware
        self.max_model_len = max_model_len
        self.temperature = temperature
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.log_probs = log_probs
        self.replaceable_weights = replaceable_weights
        self.on_text: Callable[[str, str], None] | None = None
        self._engine: Any = None

    async def __aenter__(self) -> VllmPolicy:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Loads the model into a new engine (about 20 s on a CPU). Does nothing when it runs already.

        Raises:
            DgpoError: vLLM refuses the model, or the settings in `hardware.engine`.
        """
        if self._engine is not None:
            return
        export_environment(self.hardware)
        if self.hardware.engine.in_process:
            run_in_process()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.engine_arguments()))
        except Exception as error:  # vLLM raises what its parts raise
            reason = one_line(error)[:500]
            raise DgpoError(
                f"vLLM does not start with {self.model_path} ({type(error).__name__}: {reason}): check that it is a "
                "complete checkpoint, and hardware.engine"
            ) from error

    def engine_arguments(self) -> dict[str, Any]:
        """What the engine is made with, as vLLM names it."""
        settings = self.hardware.engine
        return {
            "model": self.model_path,
            "dtype": settings.dtype,
            "enforce_eager": settings.enforce_eager,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": (
                settings.gpu_memory_utilization
                if self.replaceable_weights  # the model is in training beside the engine
                else settings.gpu_memory_utilization_alone
            ),
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": max(settings.max_num_batched_tokens, self.max_model_len),
            "max_model_len": self.max_model_len,
            "enable_chunked_prefill": settings.chunked_prefill,
            "enable_prefix_caching": True,  # every turn of an episode repeats the tokens of the turns before
            "seed": self.seed,
            "disable_log_stats": True,
            "trust_remote_code": self.trust_remote_code,
            "worker_extension_cls": REPLACEABLE if self.replaceable_weights else FIXED,
        }

    async def stop(self) -> None:
        """Ends the engine and waits for its processes; the policy may be started again."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown(timeout=self.hardware.engine.shutdown_timeout_s)
            for child in multiprocessing.active_children():
                if child.name.startswith("EngineCore"):
                    child.join(timeout=REAP_TIMEOUT_S)  # killed, and reaped only by this

    async def load_weights(self, folder: str | Path) -> None:
        """Replaces the model's weights by those in a Hugging Face folder of the same model, while no request runs.

        Raises:
            RuntimeError: the policy was not started, or not with `replaceable_weights`.
        """
        if self._engine is None or not self.replaceable_weights:
            raise RuntimeError("load_weights needs a started VllmPolicy(..., replaceable_weights=True)")
        await self._engine.collective_rpc("load_weights_from", args=(str(folder),))
        await self._engine.reset_prefix_cache()  # its keys and values are the old weights'

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """Continues `token_ids` by at most `max_tokens` tokens, through a stop string or the end-of-sequence token.

        Args:
            token_ids: everything so far, prompt and earlier turns, exactly as sampled.
            max_tokens: more than 0; `len(token_ids) + max_tokens` fits into `max_model_len`.
            stop: strings after which the turn ends; the token that completes one is kept.
            seed: of this request alone; None samples from the engine's stream. Ignored when greedy.
            request_id: unique among the requests in flight.

        Raises:
            RuntimeError: the policy was not started.

        Cancelling the call aborts the request in the engine.
        """
        if self._engine is None:
            raise RuntimeError("VllmPolicy is not started: use `async with VllmPolicy(...) as policy`")
        from vllm import SamplingParams

        sampling = SamplingParams(
            **sampling_arguments(
                self._engine.get_tokenizer(),
                temperature=self.temperature,
                max_tokens=max_tokens,
                stop=stop,
                seed=seed,
                log_probs=self.log_probs,
                streamed=self.on_text is not None,
            )
        )
        sampled: list[int] = []
        log_probs: list[float] = []
        reason = None
        # As `vllm.inputs.tokens_input` makes it: a prompt without a type goes through a thread first, to be tokenised.
        prompt = {"type": "token", "prompt_token_ids": token_ids}
        async for output in self._engine.generate(prompt, sampling, request_id):
            completion = output.outputs[0]
            sampled += completion.token_ids
            if self.log_probs:
                tables = completion.logprobs or []
                log_probs += [table[token].logprob for token, table in zip(completion.token_ids, tables, strict=True)]
            reason = completion.finish_reason
            if self.on_text and completion.text:
                self.on_text(request_id, completion.text)
        return Generation(sampled, log_probs, reason or "abort")
