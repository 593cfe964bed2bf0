"""The engine adapter: a vLLM engine whose weights can be exchanged while it runs.

``SwappableEngine`` wraps one vLLM ``AsyncLLM``. All experts of one architecture are pooled at start
(``experts.vllm_worker``); ``make_resident`` copies an expert's weights into the running engine and,
unless switched off, asks it a canary question. Requests are rendered and answered by vLLM's own
OpenAI serving layer (chat templates, tools, log-probabilities, structured outputs), one serving
object per expert, so that each answers under its own name.

Not safe for concurrent use by itself: whoever owns the slot (``deployments.swap``) sees to it that
nothing generates while weights are exchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.compat import unreadable
from experts.device_memory import DeviceMemory
from experts.errors import (
    ArtifactError,
    CanaryMismatch,
    CoeError,
    HostLost,
    SwapFailed,
)
from experts.owner_watch import OWNER_ENV
from experts.types import AnswerParsers, Endpoint
from experts.vllm_serving import (
    check_parsers,
    parse,
    refusal,
    serving_state,
    unwrap,
    vllm_errors,
    wrong_parsers,
)

SUPPORTED_VLLM = "0.32."
_EXTENSION = "experts.vllm_worker.WeightPoolExtension"
_CANARY_LOGPROB_TOLERANCE = 1e-4  # same kernels, same shapes: differences are corruption
_PREFETCH_POLL_S = 0.1
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
    sleeps: bool = False  # the engine shares its device and will be put to sleep
    device_share: float | None = None  # vLLM's gpu_memory_utilization; None: vLLM's default
    canary_enabled: bool = True
    canary_prompt: str = DEFAULT_CANARY_PROMPT
    parsers: Mapping[str, AnswerParsers] = field(default_factory=dict)  # by expert
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

    ``source``: "pool"; "disk" when the pool did not hold the weights; "device" when the engine
    still had them and only woke.
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
        self._in_pool: Mapping[str, str] = {}  # expert -> digest of the weights there
        self.entry_bytes = 0  # of host memory that one expert takes in the pool, over all ranks
        self.load_ms: float | None = None  # the newest load from disk into the pool
        self.resident: str | None = None

    # --- start and stop ---------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        experts: Mapping[str, str],
        settings: EngineSettings,
        *,
        progress: Callable[[str], None],
        lazy: bool = False,
    ) -> tuple[SwappableEngine, dict[str, str]]:
        """Start the engine on the first loadable expert and pool all of them, or with ``lazy`` only
        the first, and the others when they are asked for.

        ``experts`` maps expert id to weight folder. Returns the engine and, for experts
        that could not be pooled, the reason; raises ArtifactError when none could.
        """
        prepare_environment()
        import vllm

        if not vllm.__version__.startswith(SUPPORTED_VLLM):
            raise ArtifactError(
                "vllm", f"version {vllm.__version__} is installed, {SUPPORTED_VLLM}x is supported"
            )
        own = {name: parsers for name, parsers in settings.parsers.items() if name in experts}
        refused = wrong_parsers(own) | unreadable(experts)
        experts = {name: path for name, path in experts.items() if name not in refused}
        if not experts:
            raise ArtifactError("experts", "none has weights that can be read", refused)
        first, *others = experts
        progress(f"starting the engine with {first}")
        self = cls(await cls._launch(experts[first], settings), settings)
        try:
            refused |= await self._pool_all(experts, first, others, progress, lazy=lazy)
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
            **_sleep_arguments(settings),
            **{k: v for k, v in settings.extra.items() if k != "enforce_eager"},
        )
        os.environ[OWNER_ENV] = str(os.getpid())  # read by the workers (experts.vllm_worker)
        # Blocks for tens of seconds; heartbeats and health checks run on this loop meanwhile.
        try:
            return await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtifactError(model, f"vLLM could not start on it: {error}") from error

    async def _pool_all(
        self,
        experts: Mapping[str, str],
        first: str,
        others: list[str],
        progress: Callable[[str], None],
        *,
        lazy: bool,
    ) -> dict[str, str]:
        """Pool as many as fit, in order; the rest stay on disk until somebody asks for them."""
        total = len(experts)
        progress(f"pooling {first} (1 of {total})")
        self._paths[first] = experts[first]
        opened = await self._pool_opened(first)
        if opened["loading_note"]:
            progress(f"no loading in the background: {opened['loading_note']}")
        await self._admit(first, opened)
        refused: dict[str, str] = {}
        for at, expert in enumerate(others, start=2):
            try:
                if lazy:
                    self.add(expert, experts[expert])
                elif at <= opened["entries_max"]:
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

    async def _pool_opened(self, first: str) -> dict[str, Any]:
        try:
            return await self._report(
                "coe_open_pool", self._settings.pool_bytes, first, self._paths[first]
            )
        except Exception as error:  # the worker's exception arrives without its class
            raise ArtifactError(self._paths[first], str(error)) from error

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
        check_parsers(expert, self._parsers_of(expert))
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
        self._serving[expert] = await serving_state(
            self._engine, expert, self._paths[expert], self._parsers_of(expert)
        )
        self._pooled[expert] = Pooled(
            expert, result["bytes"], self._in_pool[expert], canary, result["seconds"]
        )
        self.resident = expert

    def _parsers_of(self, expert: str) -> AnswerParsers:
        return self._settings.parsers.get(expert, AnswerParsers())

    async def make_resident(self, expert: str, keep: Sequence[str] = ()) -> SwapReport:
        """Exchange the weights and prove them. Raises SwapFailed or CanaryMismatch.

        The engine must have no request running. After an error the slot holds no known expert.
        ``keep``: experts whose weights should stay in the pool if this one has to be loaded.
        """
        if expert not in self._paths:
            raise SwapFailed(expert, "not in the weight pool")
        self.resident = None
        started = time.perf_counter()
        result = await self._exchanged(expert, keep)
        swapped = time.perf_counter()
        if expert not in self._pooled:
            await self._admit(expert, result)
        elif self._settings.canary_enabled:
            await self._check_canary(expert)
        self.resident = expert
        if result["source"] == "disk":
            self.load_ms = result["seconds"] * 1e3
        return SwapReport(
            expert,
            result["source"],
            result["bytes"],
            result["seconds"] * 1e3,
            (swapped - started) * 1e3,
            (time.perf_counter() - swapped) * 1e3,
        )

    async def _exchanged(self, expert: str, keep: Sequence[str]) -> dict[str, Any]:
        """The exchange, waited for even when cancelled: two must never write at once."""
        writing = asyncio.ensure_future(
            self._report("coe_make_resident", expert, self._paths[expert], list(keep))
        )
        try:
            result: dict[str, Any] = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise
        except Exception as error:  # the worker's exception arrives without its class
            raise SwapFailed(expert, str(error)) from error
        self._check_digest(expert)
        return result

    def _check_digest(self, expert: str) -> None:
        known = self._pooled.get(expert)
        if known is not None and self._in_pool[expert] != known.digest:
            raise SwapFailed(expert, "its weights on disk are not those that were loaded before")

    # --- loading ahead, sleeping --------------------------------------------------------------

    @property
    def in_pool(self) -> frozenset[str]:
        """Experts whose weights are in host memory now."""
        return frozenset(self._in_pool)

    async def prefetch(self, expert: str, keep: Sequence[str] = ()) -> bool:
        """Load an expert from disk into the pool while the engine goes on serving.

        Returns when it is there, or False at once when that is not possible now: no room beside
        ``keep``, or this engine can only load into itself. Raises SwapFailed when its weights
        cannot be loaded or are not those of before. A swap that needs the disk calls it off.
        """
        started = time.perf_counter()
        begun = await self._report("coe_prefetch", expert, self._paths[expert], list(keep))
        if not begun["started"]:
            return False
        while True:
            await asyncio.sleep(_PREFETCH_POLL_S)
            report = await self._report("coe_prefetched")
            if report["done"]:
                break
        if report["failure"]:
            raise SwapFailed(expert, report["failure"])
        if expert not in self._in_pool:
            return False  # called off
        self._check_digest(expert)
        self.load_ms = (time.perf_counter() - started) * 1e3
        return True

    async def evict(self, expert: str) -> None:
        """Give up an expert's weights in host memory; it is read from disk when next asked for.

        Whoever owns the slot sees to it that nobody is about to need them.
        """
        await self._report("coe_evict", expert)

    async def sleep(self) -> None:
        """vLLM sleep mode, level 1, once nothing runs. Where the platform has no sleep mode (CPU)
        vLLM pauses scheduling and keeps the memory. Cached blocks are gone either way."""
        await self._engine.sleep(level=1, mode="wait")

    async def wake(self) -> bool:
        """Undo ``sleep``; whether everything is back on the device. Raises what vLLM raises."""
        return bool(await self._engine.wake_up())

    async def prove(self, expert: str) -> float:
        """Ask the resident expert its canary after a wake; milliseconds. Raises CanaryMismatch."""
        started = time.perf_counter()
        if self._settings.canary_enabled:
            await self._check_canary(expert)
        return (time.perf_counter() - started) * 1e3

    async def device_memory(self) -> DeviceMemory | None:
        """Of the rank with the least free; None where device memory is the host's."""
        found = await self._engine.collective_rpc("coe_device_memory")
        if found[0] is None:
            return None
        free, total = min(found)
        return DeviceMemory(free, total)

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
        by_rank = await self._engine.collective_rpc("coe_plain_copy_seconds", args=(repeats,))
        return [seconds * 1e3 for seconds in by_rank[0]]

    async def corrupt_for_test(self, expert: str, tensor_index: int = 0) -> str:
        """Damage one pooled tensor (fault injection)."""
        return str(
            (await self._engine.collective_rpc("coe_corrupt", args=(expert, tensor_index)))[0]
        )

    async def _report(self, method: str, *args: Any) -> dict[str, Any]:
        """Call all workers (tensor-parallel ranks), join what they report, note what is pooled."""
        joined = join_ranks(await self._engine.collective_rpc(method, args=args))
        self._in_pool = joined["pooled"]
        self.entry_bytes = joined["entry_bytes"]
        return joined

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
        request = parse(endpoint, {**body, "model": expert})
        request.cache_salt = self._cache_salt(expert, request.cache_salt)
        # Not the caller's to decide: who goes before whom in the engine, and where its cache goes.
        request.priority, request.kv_transfer_params = 0, None
        # vLLM folds the request id into ids of its own, which must be unique among running ones.
        request.request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        try:
            result = await self._create(expert, endpoint, request)
        except vllm_errors() as error:
            raise refusal(expert, endpoint, error) from error
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM turns a cancelled whole answer into an error body
        unwrapped = unwrap(expert, result)
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
    """One report of all ranks: bytes add up, the slowest and the first failure count, and an expert
    is pooled when every rank has its shard, under a digest of the shards' digests.
    """
    joined = dict(results[0])
    joined["bytes"] = sum(r["bytes"] for r in results)
    joined["entry_bytes"] = sum(r["entry_bytes"] for r in results)
    joined["seconds"] = max(r["seconds"] for r in results)
    if len(results) == 1:
        return joined
    if "done" in joined:
        joined["done"] = all(r["done"] for r in results)
        joined["failure"] = next((r["failure"] for r in results if r["failure"]), "")
    if "started" in joined:
        joined["started"] = any(r["started"] for r in results)
    everywhere = set.intersection(*(set(r["pooled"]) for r in results))
    joined["pooled"] = {
        expert: hashlib.sha256("".join(r["pooled"][expert] for r in results).encode()).hexdigest()
        for expert in sorted(everywhere)
    }
    return joined


def _sleep_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM refuses the flag where the platform has no sleep mode; its calls work without it."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {}
    if settings.sleeps and current_platform.is_sleep_mode_available():
        arguments["enable_sleep_mode"] = True
    if settings.device_share is not None:
        arguments["gpu_memory_utilization"] = settings.device_share
    return arguments


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
