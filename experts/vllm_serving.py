"""vLLM's OpenAI serving layer as the engine adapter uses it: requests in, bodies and errors out."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from experts.compat import stop_tokens
from experts.errors import (
    ArtifactError,
    CoeError,
    ExpertFailed,
    HostLost,
    HostUnavailable,
    InvalidRequest,
)
from experts.types import AnswerParsers, Endpoint

__all__ = [
    "check_parsers",
    "parse",
    "refusal",
    "sampling_defaults",
    "serving_state",
    "unwrap",
    "vllm_errors",
    "wrong_parsers",
]

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PROMPT_PARAMETERS = frozenset({"input_text", "input_tokens"})  # vLLM's names for the prompt


def parse(endpoint: Endpoint, body: Mapping[str, Any]) -> Any:
    """vLLM's request object of an OpenAI body. Raises InvalidRequest."""
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
        raise refusal(str(body["model"]), endpoint, error) from error
    # Some of vLLM's checks run on the raw body and trip over values of the wrong kind.
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InvalidRequest(None, f"a field has a value of the wrong kind: {error}") from error


def _field(location: tuple[int | str, ...]) -> str | None:
    """The path of a field as the caller wrote it: without the names of pydantic's own machinery."""
    parts = [str(part) for part in location if not str(part).startswith("function-")]
    return ".".join(parts) or None


def vllm_errors() -> tuple[type[Exception], ...]:
    """What vLLM's own server turns into an error answer; anything else is a bug, here or there."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMError

    # The raw ones are those that vLLM has not yet moved under VLLMError (see its error_response).
    return (VLLMError, ValueError, TypeError, OverflowError, NotImplementedError, TemplateError)


def refusal(expert: str, endpoint: Endpoint, error: Exception) -> CoeError:
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


def unwrap(expert: str, result: Any) -> dict[str, Any] | AsyncGenerator[str, None]:
    """A body or a stream of what vLLM's serving layer returned; its error answers are raised."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        raise _error_of(expert, result.error)
    if hasattr(result, "model_dump"):
        body: dict[str, Any] = result.model_dump(mode="json", exclude_unset=False)
        return body
    stream: AsyncGenerator[str, None] = result
    return stream


def check_parsers(expert: str, parsers: AnswerParsers) -> None:
    """Raises ArtifactError for a parser that this vLLM does not have."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for field, name, known in (
        ("tool_call_parser", parsers.tool_calls, ToolParserManager.list_registered()),
        ("reasoning_parser", parsers.reasoning, ReasoningParserManager.list_registered()),
    ):
        if name is not None and name not in known:
            raise ArtifactError(expert, f"{field} {name!r} is not one of {', '.join(known)}")


def wrong_parsers(parsers: Mapping[str, AnswerParsers]) -> dict[str, str]:
    """For each expert with a parser that there is not: which."""
    wrong: dict[str, str] = {}
    for expert, own in parsers.items():
        try:
            check_parsers(expert, own)
        except ArtifactError as error:
            wrong[expert] = error.message
    return wrong


async def serving_state(engine: Any, expert: str, path: str, parsers: AnswerParsers) -> Any:
    """vLLM's serving objects answering as ``expert``, with the chat template of its own folder."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    arguments = ["--model", path, "--served-model-name", expert, "--disable-log-stats"]
    arguments.append("--enable-prompt-tokens-details")  # usage tells how much the cache spared
    if parsers.tool_calls is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", parsers.tool_calls]
    if parsers.reasoning is not None:
        arguments += ["--reasoning-parser", parsers.reasoning]
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
