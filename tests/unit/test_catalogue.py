from __future__ import annotations

import pickle
from decimal import Decimal
from pathlib import Path

import pytest

from experts.catalogue import Catalogue, ExpertsSection, build_catalogue, cache_dir
from experts.errors import ConfigError, UnknownModel
from experts.quantities import micro_usd, parse_bytes, parse_count, parse_usd
from experts.strict_yaml import Section, load_text
from experts.types import AnswerParsers, Capability, Price, SourceKind


class Wrapper(Section):
    experts: ExpertsSection


def catalogue(text: str, **environ: str) -> Catalogue:
    sections = load_text(text, Wrapper, file="coe.yaml").experts
    return build_catalogue(sections, base_dir=Path("/site"), environ=environ)


def one(source: str, name: str = "a", rest: str = "") -> str:
    return (
        f"experts:\n  {name}:\n    source: {source}\n"
        "    price: {input_usd_per_mtok: 0.15, output_usd_per_mtok: 0.6}\n"
        f"    context_tokens: 2048\n{rest}"
    )


def test_a_full_description_becomes_a_spec() -> None:
    rest = (
        "    capabilities: [chat, logprobs]\n    parameters: 1.5B\n    tags: [eu]\n"
        "    languages: [en, de]\n    description: words\n"
    )
    spec = catalogue(one('{path: "cache:q/a"}', rest=rest), COE_CACHE_DIR="/big/cache").get("a")
    assert spec.kind is SourceKind.WEIGHTS
    assert spec.location == "/big/cache/q/a"
    assert spec.price == Price(150_000, 600_000)
    assert spec.capabilities == {Capability.CHAT, Capability.LOGPROBS}
    assert (spec.tags, spec.languages) == ({"eu"}, {"en", "de"})
    assert (spec.parameters, spec.description) == (1_500_000_000, "words")


def test_embeddings_need_a_server() -> None:
    """An expert host runs generations; a catalogue that promises more would lie."""
    able = "    capabilities: [embeddings]\n"
    remote = one("{url: http://h/v1, model: m}", rest=able)
    assert catalogue(remote).get("a").capabilities == {Capability.EMBEDDINGS}
    with pytest.raises(ConfigError, match="need a url source"):
        catalogue(one("{path: models/a}", rest=able))
    with pytest.raises(ConfigError, match="languages"):
        catalogue(one("{path: models/a}", rest="    languages: [English]\n"))


def test_tools_of_our_hosts_need_to_know_how_calls_are_written() -> None:
    """Without a parser vLLM would hand calls out as text, and the promise would not be kept."""
    able = "    capabilities: [chat, tools]\n"
    with pytest.raises(ConfigError, match="need tool_call_parser"):
        catalogue(one("{path: models/a}", rest=able))
    parsers = "    tool_call_parser: hermes\n    reasoning_parser: qwen3\n"
    hosted = catalogue(one("{path: models/a}", rest=able + parsers)).get("a")
    assert hosted.parsers == AnswerParsers("hermes", "qwen3")
    remote = "{url: http://h/v1, model: m}"
    assert catalogue(one(remote, rest=able)).get("a").parsers == AnswerParsers()
    with pytest.raises(ConfigError, match="belong to experts with weights"):
        catalogue(one(remote, rest=able + parsers))


@pytest.mark.parametrize(
    ("source", "kind", "location"),
    [
        ("{path: models/a}", SourceKind.WEIGHTS, "/site/models/a"),
        ("{path: /abs/a}", SourceKind.WEIGHTS, "/abs/a"),
        ("{hub: Qwen/Qwen2-7B-Instruct}", SourceKind.WEIGHTS, "Qwen/Qwen2-7B-Instruct"),
        ("{url: 'https://h/v1/', model: m}", SourceKind.REMOTE, "https://h/v1"),
        ("{scripted: 'fixed?text=a/'}", SourceKind.SCRIPTED, "fixed?text=a/"),
    ],
)
def test_each_kind_of_source(source: str, kind: SourceKind, location: str) -> None:
    spec = catalogue(one(source)).get("a")
    assert (spec.kind, spec.location) == (kind, location)


def test_a_remote_keeps_the_name_of_its_secret_only() -> None:
    spec = catalogue(one("{url: 'http://h:80/v1', model: m, api_key: 'env:MY_KEY'}"))["a"]
    assert (spec.upstream_model, spec.secret_env) == ("m", "MY_KEY")


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("{}", "exactly one of path, hub, url and scripted, got none"),
        ("{path: a, hub: b/c}", "got path and hub"),
        ("{path: a, model: b}", "belong to a url source"),
        ("{url: 'https://h/v1'}", "needs model"),
        ("{url: 'ftp://h/v1', model: m}", "expected http:// or https://"),
        ("{url: 'https:///v1', model: m}", "with a host name"),
        ("{url: 'https://h', model: m}", "the base path of the API"),
        ("{url: 'https://h/v1?key=hunter2', model: m}", "the base path of the API"),
        ("{url: 'https://u:hunter2@h/v1', model: m}", "no user or password"),
        ("{url: 'https://h/v1', model: m, api_key: hunter2}", "env:NAME"),
        ("{url: 'https://h/v1', model: m, api_key: [hunter2]}", "env:NAME"),
        ("{hub: justname}", "expected org/name"),
        ("{path: 'cache:../etc'}", "inside the cache"),
        ("{path: a}\n    options: {count: 3}", "belong to a scripted source"),
    ],
)
def test_bad_sources_are_refused_without_repeating_secrets(source: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalogue(one(source))
    assert fragment in caught.value.message
    assert caught.value.line in {2, 3}
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("name", ["auto", "coe", "coe/x", "Upper", "-dash", "a b", "x" * 65])
def test_ids_that_cannot_be_model_names(name: str) -> None:
    with pytest.raises(ConfigError, match="the name") as caught:
        catalogue(one("{scripted: echo}", name=name))
    assert caught.value.line == 2


def test_an_unknown_id_says_which_there_are() -> None:
    experts = catalogue(one("{scripted: echo}"))
    assert experts.ids == ("a",)
    assert "a" in experts
    with pytest.raises(UnknownModel) as caught:
        experts.get("b")
    assert caught.value.available == ("a",)


def test_a_catalogue_survives_pickling() -> None:
    experts = catalogue(one("{scripted: echo}", rest="    options: {count: 3}\n"))
    assert pickle.loads(pickle.dumps(experts)) == experts


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"COE_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/coe"),
        ({"HOME": "/h"}, "/h/.cache/coe"),
    ],
)
def test_cache_folder_precedence(environ: dict[str, str], expected: str) -> None:
    assert cache_dir(environ) == Path(expected)


def test_quantities_are_exact() -> None:
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_count("135M") == 135_000_000
    assert micro_usd(parse_usd(0.1) * 3) == 300_000
    assert micro_usd(Decimal("0.0000019")) == 1


@pytest.mark.parametrize("bad", [0.0000001, -1, "1e9", "x", True, None, float("inf")])
def test_amounts_that_are_not_money(bad: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_usd(bad)


@pytest.mark.parametrize("bad", ["5 MB", "GiB", -1, True, 1.5, ""])
def test_sizes_that_are_not_sizes(bad: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(bad)
