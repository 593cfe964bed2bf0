"""The one module that knows vLLM: an engine whose weights can be exchanged while it runs.

``SwappableEngine`` wraps one vLLM ``AsyncLLM``. All experts of one architecture are pooled at start
(``experts.vllm_worker``); ``make_resident`` copies an expert's weights into the running engine and,
unless switched off, asks it a canary question. Requests are rendered and answered by vLLM's own
OpenAI serving layer (chat templates, tools, log-probabilities, structured outputs), one serving
object per expert, so that each answers under its own name.

Not safe for concurrent use by itself: whoever owns the slot (``deployments.swap``) sees to it that
nothing generates while weights are exchanged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experts.compat import stop_tokens, unreadable
from experts.errors import (
    ArtifactError,
    CanaryMismatch,
    CoeError,
    ExpertFailed,
    HostLost,
    HostUnavailable,
    InvalidRequest,
    SwapFailed,
)
from experts.owner_watch import OWNER_ENV
from experts.types import Endpoint

SUPPORTED_VLLM = "0.32."
_EXTENSION = "experts.vllm_worker.WeightPoolExtension"
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PROMPT_PARAMETERS = frozenset({"input_text", "input_tokens"})  # vLLM's names for the prompt
_CANARY_LOGPROB_TOLERANCE = 1e-4  # same kernels, same shapes: differences are corruption
DEFAULT_CANARY_PROMPT = "The quick brown fox jumps over the lazy dog. Paris is the capital of"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run the engine. ``kv_cache_bytes`` bounds the KV cache, ``pool_bytes`` the pool."""

    dtype: str = "auto"
    max_model_len: int = 2048
    kv_cache_bytes: int = 512 << 20
    max_num_seqs: int = 16
    tensor_parallel: int = 1
    pool_bytes: int = 4 << 30
    canary_enabled: bool = True
    canary_prompt: str = DEFAULT_CANARY_PROMPT
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Canary:
    """First greedy token of the fixed prompt, recorded when the expert was pooled."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Pooled:
    """One expert in the pool. ``seconds`` is the time from disk to pool."""

    expert: str
    bytes: int
    digest: str
    canary: Canary
    seconds: float


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What a swap took: the copy inside the worker, the whole call, and the canary apart.

    ``source``: "pool", or "disk" when the pool did not hold the weights.
    """

    expert: str
    source: str
    bytes: int
    copy_ms: float
    swap_ms: float
    canary_ms: float


def prepare_environment() -> None:
    """Process environment that vLLM reads at import. Call before anything imports vllm."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Otherwise the first request with log-probabilities waits ~20 s on CPU for a kernel to compile.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # The CPU build warns once per tensor of every load otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _pick_dtype(requested: str) -> str:
    """bfloat16 where the CPU multiplies it natively, else float32; accelerators decide
    themselves."""
    import torch
    from vllm.platforms import current_platform

    if requested != "auto" or not current_platform.is_cpu():
        return requested
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


class SwappableEngine:
    """One running engine, its pool, and the expert whose weights it holds."""

    def __init__(self, engine: Any, settings: EngineSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._paths: dict[str, str] = {}
        self._pooled: dict[str, Pooled] = {}
        self._serving: dict[str, Any] = {}
        self.resident: str | None = None

    # --- start and stop ---------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        experts: Mapping[str, str],
        settings: EngineSettings,
        *,
        progress: Callable[[str], None],
    ) -> tuple[SwappableEngine, dict[str, str]]:
        """Start the engine on the first loadable expert and pool all of them.

        ``experts`` maps expert id to weight folder. Returns the engine and, for experts
        that could not be pooled, the reason; raises ArtifactError when none could.
        """
        prepare_environment()
        import vllm

        if not vllm.__version__.startswith(SUPPORTED_VLLM):
            raise ArtifactError(
                "vllm", f"version {vllm.__version__} is installed, {SUPPORTED_VLLM}x is supported"
            )
        refused = unreadable(experts)
        experts = {name: path for name, path in experts.items() if name not in refused}
        if not experts:
            raise ArtifactError("experts", "none has weights that can be read", refused)
        first, *others = experts
        progress(f"starting the engine with {first}")
        self = cls(await cls._launch(experts[first], settings), settings)
        try:
            refused |= await self._pool_all(experts, first, others, progress)
        except BaseException:
            self.shutdown()
            raise
        return self, refused

    @staticmethod
    async def _launch(model: str, settings: EngineSettings) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=model,
            dtype=_pick_dtype(settings.dtype),
            max_model_len=settings.max_model_len,
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            max_num_seqs=settings.max_num_seqs,
            tensor_parallel_size=settings.tensor_parallel,
            enforce_eager=settings.extra.get("enforce_eager", _on_cpu()),
            enable_prefix_caching=True,
            generation_config="vllm",
            worker_extension_cls=_EXTENSION,
            disable_log_stats=True,
            **{k: v for k, v in settings.extra.items() if k != "enforce_eager"},
        )
        os.environ[OWNER_ENV] = str(os.getpid())  # read by the workers (experts.vllm_worker)
        # Blocks for tens of seconds; heartbeats and health checks run on this loop meanwhile.
        return await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)

    async def _pool_all(
        self,
        experts: Mapping[str, str],
        first: str,
        others: list[str],
        progress: Callable[[str], None],
    ) -> dict[str, str]:
        """Pool as many as fit, in order; the rest stay on disk until somebody asks for them."""
        total = len(experts)
        progress(f"pooling {first} (1 of {total})")
        opened = await self._rpc("coe_open_pool", self._settings.pool_bytes, first)
        self._paths[first] = experts[first]
        await self._admit(first, opened)
        refused: dict[str, str] = {}
        for at, expert in enumerate(others, start=2):
            try:
                if at <= opened["entries_max"]:
                    progress(f"pooling {expert} ({at} of {total})")
                    await self.pool(expert, experts[expert])
                else:
                    progress(f"{expert} stays on disk: the pool is full ({at} of {total})")
                    self.add(expert, experts[expert])
            except CoeError as error:
                refused[expert] = error.message
        if self.resident != first:
            await self.make_resident(first)  # proves the first swap before anybody waits for it
        return refused

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()

    # --- pool and swap ----------------------------------------------------------------------------

    def add(self, expert: str, path: str) -> None:
        """Make an expert known; its weights are read when it is first asked for.

        Raises ArtifactError when it cannot share this engine.
        """
        from experts.compat import check_compatible

        check_compatible(self._engine.vllm_config.model_config.model, path, expert=expert)
        self._paths[expert] = path

    async def pool(self, expert: str, path: str) -> Pooled:
        """Load an expert from disk now; it is resident afterwards. The engine must be idle.

        Raises ArtifactError; the expert that was resident before is put back then.
        """
        before = self.resident
        self.add(expert, path)
        try:
            await self.make_resident(expert)
        except SwapFailed as error:
            del self._paths[expert]
            if before is not None:
                await self.make_resident(before)
            raise ArtifactError(path, f"{expert} could not be pooled: {error.reason}") from error
        return self._pooled[expert]

    async def _admit(self, expert: str, result: Mapping[str, Any]) -> None:
        """Weights came in for the first time: record their canary, set up the serving layer."""
        canary = await self._ask_canary()
        self._serving[expert] = await _serving_state(self._engine, expert, self._paths[expert])
        self._pooled[expert] = Pooled(
            expert, result["bytes"], result["digest"], canary, result["seconds"]
        )
        self.resident = expert

    async def make_resident(self, expert: str) -> SwapReport:
        """Exchange the weights and prove them. Raises SwapFailed or CanaryMismatch.

        The engine must have no request running. After an error the slot holds no known expert.
        """
        if expert not in self._paths:
            raise SwapFailed(expert, "not in the weight pool")
        self.resident = None
        started = time.perf_counter()
        result = await self._exchanged(expert)
        swapped = time.perf_counter()
        if expert not in self._pooled:
            await self._admit(expert, result)
        elif self._settings.canary_enabled:
            await self._check_canary(expert)
        self.resident = expert
        return SwapReport(
            expert,
            result["source"],
            result["bytes"],
            result["seconds"] * 1e3,
            (swapped - started) * 1e3,
            (time.perf_counter() - swapped) * 1e3,
        )

    async def _exchanged(self, expert: str) -> dict[str, Any]:
        """The exchange, waited for even when cancelled: two must never write at once."""
        writing = asyncio.ensure_future(self._rpc("coe_make_resident", expert, self._paths[expert]))
        try:
            result: dict[str, Any] = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise
        except Exception as error:  # the worker's exception arrives without its class
            raise SwapFailed(expert, str(error)) from error
        known = self._pooled.get(expert)
        if known is not None and result.get("digest", known.digest) != known.digest:
            raise SwapFailed(expert, "its weights on disk are not those that were loaded before")
        return result

    async def _check_canary(self, expert: str) -> None:
        want = self._pooled[expert].canary
        got = await self._ask_canary()
        off = abs(got.logprob - want.logprob)
        # A NaN log-probability compares false to everything and must fail.
        if got.token_id != want.token_id or not off <= _CANARY_LOGPROB_TOLERANCE:
            raise CanaryMismatch(expert, want.token_id, got.token_id, want.logprob, got.logprob)

    async def _ask_canary(self) -> Canary:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        tokenizer = self._engine.get_tokenizer()
        # A salt of its own keeps the canary from being answered out of cached blocks.
        prompt = tokens_input(
            tokenizer.encode(self._settings.canary_prompt), cache_salt=uuid.uuid4().hex
        )
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)
        final = None
        async for output in self._engine.generate(prompt, params, f"canary-{uuid.uuid4().hex}"):
            final = output
        assert final is not None
        answer = final.outputs[0]
        token = answer.token_ids[0]
        return Canary(token, float(answer.logprobs[0][token].logprob))

    async def plain_copy_ms(self, repeats: int) -> list[float]:
        """Milliseconds of plain copies of an entry's bytes, made where the swap is made."""
        return [s * 1e3 for s in await self._rpc("coe_plain_copy_seconds", repeats)]

    async def corrupt_for_test(self, expert: str, tensor_index: int = 0) -> str:
        """Damage one pooled tensor (fault injection)."""
        return str(await self._rpc("coe_corrupt", expert, tensor_index))

    async def _rpc(self, method: str, *args: Any) -> Any:
        """Call all workers (tensor-parallel ranks) and join what they report."""
        results = await self._engine.collective_rpc(method, args=args)
        return join_ranks(results) if isinstance(results[0], dict) else results[0]

    @property
    def pooled(self) -> Mapping[str, Pooled]:
        """Experts whose weights have been loaded at least once."""
        return self._pooled

    async def check_health(self) -> None:
        """Raise HostLost when the engine is dead."""
        if self._engine.errored:
            raise HostLost(self.resident or "", "")

    @property
    def engine(self) -> Any:
        """The wrapped AsyncLLM, for tests that compare against it."""
        return self._engine

    # --- answering --------------------------------------------------------------------------------

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]:
        """Answer one OpenAI request with the resident weights: a body, or SSE lines.

        Raises InvalidRequest for what vLLM rejects, HostLost when the engine is dead, and
        HostUnavailable or ExpertFailed for other failures. The first SSE line is produced lazily;
        what vLLM finds wrong only then is an error event. Closing the iterator aborts the
        generation.
        """
        request = _parse(endpoint, {**body, "model": expert})
        request.cache_salt = self._cache_salt(expert, request.cache_salt)
        # vLLM folds the request id into ids of its own, which must be unique among running ones.
        request.request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        try:
            result = await self._create(expert, endpoint, request)
        except _vllm_errors() as error:
            raise _refusal(expert, endpoint, error) from error
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM turns a cancelled whole answer into an error body
        unwrapped = _unwrap(expert, result)
        return unwrapped if isinstance(unwrapped, dict) else self._until_dead(expert, unwrapped)

    async def _create(self, expert: str, endpoint: Endpoint, request: Any) -> Any:
        state = self._serving[expert]
        if endpoint is Endpoint.CHAT:
            return await state.openai_serving_chat.create_chat_completion(request)
        return await state.openai_serving_completion.create_completion(request)

    async def _until_dead(
        self, expert: str, events: AsyncGenerator[str, None]
    ) -> AsyncIterator[str]:
        """vLLM reports a dead engine as an error of the request; here the whole host is lost."""
        async with contextlib.aclosing(events):
            async for event in events:
                if '"error"' in event and self._engine.errored:
                    raise HostLost(expert, "")
                yield event

    def _cache_salt(self, expert: str, callers: str | None) -> str:
        """Cached blocks belong to one expert's exact weights, and to the caller's salt if any."""
        own = f"{expert}@{self._pooled[expert].digest[:16]}"
        return f"{own}/{callers}" if callers else own


def join_ranks(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all ranks: bytes add up, the slowest counts, digests are digested together."""
    joined = dict(results[0])
    joined["bytes"] = sum(r["bytes"] for r in results)
    joined["seconds"] = max(r["seconds"] for r in results)
    if "digest" in joined and len(results) > 1:
        joined["digest"] = hashlib.sha256(
            "".join(r["digest"] for r in results).encode()
        ).hexdigest()
    return joined


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _parse(endpoint: Endpoint, body: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMClientError

    model = ChatCompletionRequest if endpoint is Endpoint.CHAT else CompletionRequest
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(_field(first["loc"]), str(first["msg"])) from error
    except VLLMClientError as error:
        raise _refusal(str(body["model"]), endpoint, error) from error
    # Some of vLLM's checks run on the raw body and trip over values of the wrong kind.
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InvalidRequest(None, f"a field has a value of the wrong kind: {error}") from error


def _field(location: tuple[int | str, ...]) -> str | None:
    """The path of a field as the caller wrote it: without the names of pydantic's own machinery."""
    parts = [str(part) for part in location if not str(part).startswith("function-")]
    return ".".join(parts) or None


def _vllm_errors() -> tuple[type[Exception], ...]:
    """What vLLM's own server turns into an error answer; anything else is a bug, here or there."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMError

    # The raw ones are those that vLLM has not yet moved under VLLMError (see its error_response).
    return (VLLMError, ValueError, TypeError, OverflowError, NotImplementedError, TemplateError)


def _refusal(expert: str, endpoint: Endpoint, error: Exception) -> CoeError:
    """What vLLM raised, as our error; whose fault it is, vLLM's own table says."""
    from vllm.entrypoints.serve import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return HostLost(expert, "")
    info = create_error_response(error).error
    if info.param in _PROMPT_PARAMETERS:
        info.param = "messages" if endpoint is Endpoint.CHAT else "prompt"
    return _error_of(expert, info)


def _error_of(expert: str, info: Any) -> CoeError:
    """``info`` is vLLM's ErrorInfo."""
    if info.code < 500:
        return InvalidRequest(info.param, info.message)
    if info.code == 503:
        return HostUnavailable(expert, retry_after_ms=1_000.0)
    return ExpertFailed(expert, info.code, info.message, info.param)


def _unwrap(expert: str, result: Any) -> dict[str, Any] | AsyncGenerator[str, None]:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        raise _error_of(expert, result.error)
    if hasattr(result, "model_dump"):
        body: dict[str, Any] = result.model_dump(mode="json", exclude_unset=False)
        return body
    stream: AsyncGenerator[str, None] = result
    return stream


async def _serving_state(engine: Any, expert: str, path: str) -> Any:
    """vLLM's serving objects answering as ``expert``, with the chat template of its own folder."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    arguments = ["--model", path, "--served-model-name", expert, "--disable-log-stats"]
    template = Path(path) / "chat_template.jinja"
    if template.is_file():
        arguments += ["--chat-template", str(template)]
    state = State()
    await init_app_state(
        engine, state, _frontend_args(arguments), await engine.get_supported_tasks()
    )
    # vLLM would give all of them the defaults of the model that the engine was started with, and
    # would end their answers at that model's stop tokens only.
    defaults = sampling_defaults(Path(path))
    foreign = stop_tokens(path) - stop_tokens(engine.vllm_config.model_config.model)
    if foreign:
        defaults["stop_token_ids"] = sorted(foreign)
    for serving in (state.openai_serving_chat, state.openai_serving_completion):
        serving.default_sampling_params = defaults
    return state


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What ``generation_config.json`` says about requests that name no temperature and so on."""
    try:
        config = json.loads((folder / "generation_config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtifactError(str(folder), f"generation_config.json is not JSON: {error}") from error
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    return {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}


def _frontend_args(arguments: list[str]) -> argparse.Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    return namespace
