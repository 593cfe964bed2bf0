"""``coe``: serve, ask, train and check, from a terminal.

Each command prints for a person; ``--json FILE`` writes the same as data (``-``: standard output).
Errors are one sentence on standard error and exit status 1; 2 is a wrong command line.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from experts.errors import CoeError
from gateway.ask import CommandFailed, ask, base_url
from gateway.cli_show import (
    progress_bar,
    show_joined,
    show_route,
    show_training,
)
from gateway.data_import.command import data_app
from gateway.decisions_command import decisions_app
from gateway.feedback_command import feedback_app, read_feedback
from gateway.json_output import write_json
from gateway.keys_command import keys_app
from gateway.policy_command import add_commands

app = typer.Typer(
    name="coe",
    help="Composition-of-Experts gateway: one OpenAI-compatible endpoint, many expert LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at coe.yaml.", no_args_is_help=True)
policy_app = typer.Typer(help="Look at policy files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(policy_app, name="policy")
app.add_typer(keys_app, name="keys")
app.add_typer(feedback_app, name="feedback")
app.add_typer(data_app, name="data")
app.add_typer(decisions_app, name="decisions")
add_commands(policy_app)

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="coe.yaml (default: $COE_CONFIG, ./coe.yaml, the quickstart's)."),
]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="Gateway to ask (default: the configuration's address).")
]


EmbedderOption = Annotated[
    str, typer.Option(help="minilm-int8, or sentence-transformers:<folder or hub id>.")
]
DropConflictsOption = Annotated[
    bool,
    typer.Option("--drop-conflicts", help="Leave out equal prompts of different categories."),
]


def main() -> None:
    """Entry point; turns our errors into a sentence and an exit status."""
    try:
        app()
    except (CoeError, CommandFailed) as error:
        print(f"coe: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Gateway processes.", min=1)] = None,
) -> None:
    """Start everything: state store, Ray, expert hosts, gateway. Ctrl-C stops all of it."""
    from gateway.config import default_config_path
    from gateway.supervisor import ServeOptions
    from gateway.supervisor import serve as run

    options = ServeOptions(config or default_config_path(), host, port, workers)
    raise typer.Exit(run(options))


@app.command()
def route(
    text: Annotated[str, typer.Argument(help="A prompt, as a user would type it.")],
    policy: Annotated[str | None, typer.Option(help="Policy to ask (default: auto).")] = None,
    config: ConfigOption = None,
    url: UrlOption = None,
    json_file: JsonOption = None,
) -> None:
    """Say which expert would answer, and why. Calls no model.

    Asks the running gateway, whose answer knows which experts are up and how long they would take.
    With none running, the same code decides here, taking every expert for available.
    """
    body = {
        "model": f"coe/{policy}" if policy else "auto",
        "messages": [{"role": "user", "content": text}],
    }
    base = base_url(url) if url else _gateway_url(config)
    explanation = ask(f"{base}/v1/route", "plan", body)
    live = explanation is not None
    if explanation is None:
        if url is not None:
            raise _unreachable(base)
        explanation = asyncio.run(_explain_offline(config, body))
    explanation["live"] = live
    write_json(explanation, json_file)
    if json_file != "-":
        show_route(explanation, live)


@app.command()
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Requests, in OpenAI's batch format.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="Answers; an unfinished one is continued.")
    ],
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1, max=1024)] = 16,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what failed in an earlier run.")
    ] = False,
    api_key_env: Annotated[
        str,
        typer.Option(help="Environment variable that holds the gateway's key, if it needs one."),
    ] = "COE_API_KEY",
    config: ConfigOption = None,
    url: UrlOption = None,
    json_file: JsonOption = None,
) -> None:
    """Answer a file of requests, grouped by expert. Running it again goes on where it stopped.

    Exit status: 0 all answered, 1 some failed, 130 stopped by Ctrl-C with lines left.
    """
    from gateway.batch import BatchOptions
    from gateway.batch_client import GatewayAddress
    from gateway.batch_command import exit_status, run_files
    from gateway.batch_files import BatchError
    from gateway.batch_report import show_summary

    gateway = GatewayAddress(
        url or _gateway_url(config), os.environ.get(api_key_env), connections=concurrency
    )
    options = BatchOptions(gateway, concurrency)
    try:
        summary = run_files(source, target, options, retry_failed=retry_failed)
    except BatchError as error:
        raise CommandFailed(str(error)) from error
    write_json({"input": source, "output": target, **summary.as_json()}, json_file)
    if json_file != "-":
        show_summary(summary, str(target))
    raise typer.Exit(exit_status(summary))


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Option(help="Folder with queries.parquet, or a JSONL file of prompt and category."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the router artifact to.")],
    seed: Annotated[int, typer.Option(help="Equal data and seed give an equal artifact.")] = 0,
    embedder: EmbedderOption = "minilm-int8",
    drop_conflicts: DropConflictsOption = False,
    add_expert: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTIFACT",
            help="Only let the new experts of --data join this artifact; retrains nothing.",
        ),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(help="What coe feedback export wrote; blended with the recorded scores."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Train the router and measure it by cross-validation.

    On labelled prompts it learns categories. On a folder that has outcomes.parquet as well, it also
    learns to estimate, per query, how good each expert's answer would be.
    """
    from gateway.evaluation.train_command import TrainOptions, add_to
    from gateway.evaluation.train_command import train as run

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    given = None if feedback is None else tuple(read_feedback(feedback))
    options = TrainOptions(data, out, seed, now, embedder, drop_conflicts, given)
    if add_expert is not None:
        joined = add_to(add_expert, options)
        write_json(joined, json_file)
        if json_file != "-":
            show_joined(joined)
        return
    with progress_bar() as progress:
        result = run(options, progress)
    write_json(result, json_file)
    if json_file != "-":
        show_training(result)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder with queries and outcomes to score on.")],
    artifact: Annotated[
        Path | None, typer.Option(help="Router to score, as coe train wrote it.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Folder to train on first; may be the same as --data.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Mean costs per query to report at, as in 31,54.")
    ] = "",
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the queries to score if --train is --data (default: 0.3)."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for an HTML page with plots.")
    ] = None,
    embedder: EmbedderOption = "minilm-int8",
    drop_conflicts: DropConflictsOption = False,
    seed: Annotated[int, typer.Option(help="Equal data and seed give equal figures.")] = 0,
    cascade_search: Annotated[
        Literal["greedy", "full"],
        typer.Option(help="How cascade routing chooses: one answer ahead, or over sets."),
    ] = "greedy",
    json_file: JsonOption = None,
) -> None:
    """Score a router on recorded outcomes that it has not seen, beside what it must beat."""
    from gateway.evaluation.evaluate import EvaluateOptions
    from gateway.evaluation.evaluate import evaluate as run
    from gateway.evaluation.report import write_report
    from gateway.evaluation.show import show_evaluation

    options = EvaluateOptions(
        data,
        artifact,
        train,
        _numbers(budgets),
        holdout,
        drop_conflicts,
        embedder,
        seed,
        cascade_search=cascade_search,
    )
    with progress_bar() as progress:
        evaluation = run(options, progress)
    write_json(evaluation.result, json_file)
    if json_file != "-":
        show_evaluation(evaluation.result)
    if report is not None:
        print(f"wrote {write_report(evaluation, report)}", file=sys.stderr)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Option(help="Parquet file of client rates or single requests.")],
    experts: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="How many experts (default: cluster's).")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="A cluster file, or a shipped one: h100_node, samba_coe.")
    ] = "h100_node",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal results.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0.01, max=10_000, help="How much of the trace to replay.")
    ] = 30.0,
    rate_scale: Annotated[
        float, typer.Option(min=1e-6, max=1e6, help="Multiplies the trace's request rates.")
    ] = 1.0,
    ttft_objective_s: Annotated[
        float, typer.Option(min=0.001, help="A later first token does not count as goodput.")
    ] = 5.0,
    patience_s: Annotated[
        float, typer.Option(min=0.001, max=86_400, help="How long callers wait for a start.")
    ] = 120.0,
    json_file: JsonOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for an HTML page with plots.")
    ] = None,
) -> None:
    """Replay recorded arrivals on a described cluster and compare swap policies."""
    from deployments.simulate.command import SimulateOptions
    from deployments.simulate.command import simulate as run
    from gateway.simulate_output import show_simulation, write_report

    options = SimulateOptions(
        trace, cluster, experts, seed, minutes, rate_scale, ttft_objective_s, patience_s
    )
    began = time.monotonic()
    with progress_bar() as progress:
        result = run(options, progress)
    result["runtime_s"] = round(time.monotonic() - began, 2)
    write_json(result, json_file)
    if json_file != "-":
        show_simulation(result)
    if report is not None:
        print(f"wrote {write_report(result, report)}", file=sys.stderr)


@app.command()
def status(
    config: ConfigOption = None, url: UrlOption = None, json_file: JsonOption = None
) -> None:
    """Is it up? Gateway, state store, hosts, experts, and what is wrong with any of them.

    With --url alone only what that gateway says of itself: whose store it uses is not known then.
    Give --config as well to have that configuration's store read.
    """
    from gateway.config import default_config_path, load_config
    from gateway.status_command import show_status, view_of_store

    base = base_url(url) if url else _gateway_url(config)
    reply = ask(f"{base}/health/ready", "status")
    if reply is None:
        raise _unreachable(base)
    if url is None or config is not None:
        reply |= view_of_store(config, load_config(config or default_config_path()))
    write_json(reply, json_file)
    if json_file != "-":
        show_status(base, reply)
    if reply.get("status") == "missing":
        raise typer.Exit(1)


@config_app.command("check")
def config_check(
    config: Annotated[Path | None, typer.Argument(help="The file to check.")] = None,
) -> None:
    """Check coe.yaml, its policies and its router artifact, without starting anything."""
    from gateway.config import default_config_path, load_config
    from policies.live import PolicyWatcher
    from routers.router import SemanticRouter

    loaded = load_config(config or default_config_path())
    policies = PolicyWatcher(
        loaded.policies.dir, loaded.catalogue.ids, loaded.policies.default
    ).current
    router = SemanticRouter.load(loaded.router.artifact)
    print(f"{loaded.path}: in order")
    print(f"  experts   {', '.join(loaded.catalogue.ids)}")
    print(f"  hosts     {', '.join(h.name for h in loaded.hosts) or 'none'}")
    print(f"  policies  {', '.join(policies.names)} (default: {policies.default})")
    print(f"  router    {', '.join(router.categories)}")
    unrouted = sorted(
        {c for p in policies.policies.values() for c in p.routes} - {*router.categories, "general"}
    )
    if unrouted:
        print(f"  note: policies route {', '.join(unrouted)}, which the router never chooses")
    asyncio.run(router.aclose())


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of coe.yaml, for editors."""
    from gateway.config import config_json_schema

    print(json.dumps(config_json_schema(), indent=2))


@policy_app.command("check")
def policy_check(
    files: Annotated[list[Path], typer.Argument(help="Policy files.")],
    config: ConfigOption = None,
    budget_usd: Annotated[
        float | None,
        typer.Option(
            "--budget-usd-per-request",
            min=0,
            help="Also solve per_query.quality_per_usd for this mean cost of a request.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of a prompt to solve for.")
    ] = 200,
) -> None:
    """Check policy files against the schema and the experts of coe.yaml."""
    from gateway.config import default_config_path, load_config
    from gateway.policy_price import solved_price
    from policies.loader import load_policy

    catalogue = load_config(config or default_config_path()).catalogue
    wrong = 0
    for path in files:
        try:
            policy = load_policy(path, catalogue.ids)
        except CoeError as error:
            wrong += 1
            print(error.message, file=sys.stderr)
        else:
            print(f"{path}: in order (digest {policy.digest})")
            if budget_usd is not None:
                print(f"  {solved_price(policy, catalogue, budget_usd, prompt_tokens)}")
    raise typer.Exit(1 if wrong else 0)


@policy_app.command("diff")
def policy_diff(
    before: Annotated[Path, typer.Argument(help="A policy file.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what differs between two policies, written the same way. Exit status 1 if anything."""
    import difflib

    from policies.loader import dump_policy, load_policy

    old, new = (dump_policy(load_policy(path, None)).splitlines() for path in (before, after))
    lines = list(difflib.unified_diff(old, new, str(before), str(after), lineterm="", n=1))
    print("\n".join(lines) if lines else "no difference")
    raise typer.Exit(1 if lines else 0)


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from policies.loader import policy_json_schema

    print(json.dumps(policy_json_schema(), indent=2))


# --- talking to a gateway -------------------------------------------------------------------------


def _unreachable(url: str) -> CommandFailed:
    return CommandFailed(
        f"no gateway answers at {url}. Start one with `coe serve`, or name it with --url."
    )


def _gateway_url(config: Path | None) -> str:
    from gateway.config import default_config_path, load_config
    from gateway.start_report import dialable

    gateway = load_config(config or default_config_path()).gateway
    return f"http://{dialable(gateway.host)}:{gateway.port}"


async def _explain_offline(config: Path | None, body: dict[str, Any]) -> dict[str, Any]:
    from gateway.config import default_config_path, load_config
    from gateway.offline import explain

    return await explain(load_config(config or default_config_path()), body)


def _numbers(listed: str) -> tuple[float, ...]:
    """``31,54`` as numbers; refuses what is not a number above zero."""
    try:
        found = tuple(float(part) for part in listed.split(",") if part.strip())
    except ValueError as error:
        raise CommandFailed(f"--budgets {listed}: {error}; write numbers as in 31,54.") from error
    if not all(0 < number < float("inf") for number in found):
        raise CommandFailed(f"--budgets {listed}: budgets are above zero.")
    return found


if __name__ == "__main__":
    main()
