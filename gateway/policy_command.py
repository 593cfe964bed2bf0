"""``coe policy activate|rollback|release|canary|list``: policy versions in the shared store, and
``coe policy solve``: a policy file from recorded outcomes.

The orders to the store are the admin API's, for whoever can reach it; every worker of every gateway
follows within a second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.ask import CommandFailed
from gateway.json_output import write_json
from gateway.keys_command import ConfigOption, configuration, with_store

if TYPE_CHECKING:
    from deployments.store import StateStore
    from experts.catalogue import Catalogue
    from gateway.policy_solve import Budget
    from gateway.policy_versions import PolicyRecord, Version
    from routers.outcomes import Outcomes

__all__ = ["add_commands"]

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The policy.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="The policy it is for (default: the file's name).")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands under ``coe policy``."""
    app.command("activate")(activate)
    app.command("rollback")(rollback)
    app.command("release")(release)
    app.command("canary")(canary)
    app.command("list")(list_policies)
    app.command("solve")(solve)
    app.command("cascade")(cascade)


def activate(file: FileArgument, name: NameOption = None, config: ConfigOption = None) -> None:
    """Put a version in force on every gateway of the store; it is checked first."""
    from gateway.policy_versions import activated

    version = _version(file, config)
    record = _change(name or file.stem, lambda r: activated(r, version, version.at_ms), config)
    print(f"{record.name}: {record.active} is in force")


def rollback(name: NameArgument, config: ConfigOption = None) -> None:
    """Put in force what was before; a second time goes back one step further."""
    from gateway.policy_versions import rolled_back

    _tell(_change(name, rolled_back, config))


def release(name: NameArgument, config: ConfigOption = None) -> None:
    """Put the file's version in force again, on each gateway its own file's."""
    from gateway.policy_versions import released

    _tell(_change(name, lambda r: released(r, _now_ms()), config))


def canary(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The version to try.")] = None,
    share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Of the sessions, such as 0.05.")
    ] = None,
    name: NameOption = None,
    off: Annotated[bool, typer.Option("--off", help="End the trial; needs --name.")] = False,
    config: ConfigOption = None,
) -> None:
    """Try a version on a share of the sessions, or end the trial."""
    from gateway.policy_versions import with_canary, without_canary

    if off:
        if name is None or file is not None or share is not None:
            raise CommandFailed("--off takes --name and nothing else.")
        _tell(_change(name, without_canary, config))
        return
    if file is None or share is None:
        raise CommandFailed("name a FILE and its --share, or --off with --name.")
    version = _version(file, config)
    wanted = share
    record = _change(name or file.stem, lambda r: with_canary(r, version, wanted), config)
    print(f"{record.name}: {record.canary} for {100 * record.canary_share:g} % of sessions")


def list_policies(config: ConfigOption = None) -> None:
    """Show what the store says of each policy; what it does not name follows its file."""
    from gateway.state.policies import PolicyStore

    async def read(store: StateStore) -> dict[str, PolicyRecord]:
        _, records = await PolicyStore(store).read()
        return records or {}

    records = with_store(config, configuration(config), read)
    if not records:
        print("the store holds no versions; every policy follows its file")
    for record in sorted(records.values(), key=lambda r: r.name):
        _tell(record)


def solve(
    data: Annotated[Path, typer.Option(help="Folder with queries.parquet and outcomes.parquet.")],
    cap_usd: Annotated[
        float, typer.Option(min=0.0, help="caps.cost_usd: the most a request may cost.")
    ],
    max_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Mean cost of a query, in the data's unit.")
    ] = None,
    max_parameters: Annotated[
        str | None, typer.Option(help="Of all experts in use together, such as 31B.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The policy file (default: print it).")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="The figures; - for stdout.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Solve which expert should serve which category, from recorded outcomes, within a budget.

    Prints what the map is expected to score and cost beside the best single expert. With --config,
    experts of the data that it does not have are left out.
    """
    from gateway.policy_solve import policy_text, solve_map
    from gateway.policy_solve_show import described, show
    from policies.loader import parse_policy
    from routers.outcomes import read_outcomes

    if out is None and json_file == "-":
        raise CommandFailed("--json - prints to standard output: give the policy an --out FILE.")
    budget = _budget(max_cost, max_parameters, config)
    catalogue = _catalogue(config)
    outcomes = read_outcomes(data, experts_min=1)
    if catalogue is not None:
        outcomes = _served(outcomes, catalogue)
    sizes = {n: catalogue.get(n).parameters for n in outcomes.experts} if catalogue else None
    solution = solve_map(outcomes, budget, sizes)
    text = policy_text(solution, cap_usd=cap_usd, description=described(outcomes, budget))
    name = out.stem if out is not None else "solved"
    parse_policy(text, name=name, file=str(out or name), catalogue_ids=outcomes.experts)
    show(solution, outcomes.cost_unit)
    if json_file is not None:
        write_json(solution.as_json() | {"cost_unit": outcomes.cost_unit}, json_file)
    if out is None:
        print(text, end="")
        return
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)


def cascade(
    data: Annotated[Path, typer.Option(help="Data set folder whose outcomes have confidences.")],
    cap_usd: Annotated[
        float, typer.Option(min=0.0, help="caps.cost_usd: the most a request may cost.")
    ],
    quality_per_usd: Annotated[
        float, typer.Option(min=0.0, help="Quality, 0 to 1, that one US dollar is worth.")
    ],
    stages: Annotated[int, typer.Option(min=1, max=8, help="caps.stages")] = 3,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Length of an answer, for the expected cost.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Of the folds.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The policy file (default: print it).")] = None,
    config: ConfigOption = None,
) -> None:
    """Fit a per-query policy with drafts from recorded outcomes and confidences.

    The confidences have to be mean token log-probabilities, as a gateway judges by. With --config,
    experts of the data that it does not have are left out.
    """
    from gateway.cascade_fit import cascade_policy_text, fit_cascade
    from gateway.cli_show import progress_bar
    from policies.loader import parse_policy
    from routers.outcomes import read_outcomes

    catalogue = _catalogue(config)
    outcomes = read_outcomes(data, experts_min=1)
    if catalogue is not None:
        outcomes = _served(outcomes, catalogue)
    with progress_bar() as tick:
        fit = fit_cascade(outcomes, seed=seed, tick=tick)
    text = cascade_policy_text(
        fit,
        quality_per_usd=quality_per_usd,
        cap_usd=cap_usd,
        stages=stages,
        output_tokens=output_tokens,
        description=f"Fitted to {outcomes.name} ({outcomes.digest[:12]}, {len(outcomes)} queries).",
    )
    name = out.stem if out is not None else "fitted"
    parse_policy(text, name=name, file=str(out or name), catalogue_ids=outcomes.experts)
    drafts = ", ".join(f"{name} {sd:g}" for name, sd in fit.confidence_sd.items())
    print(f"drafts that tell something, and how much: {drafts or 'none'}", file=sys.stderr)
    if out is None:
        print(text, end="")
        return
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)


def _budget(max_cost: float | None, max_parameters: str | None, config: Path | None) -> Budget:
    from experts.quantities import parse_count
    from gateway.policy_solve import Budget

    if max_cost is not None and max_parameters is not None:
        raise CommandFailed("give --max-cost or --max-parameters, not both.")
    if max_parameters is not None and config is None:
        raise CommandFailed("--max-parameters needs --config: sizes are the experts' `parameters`.")
    if max_parameters is None:
        return Budget(mean_cost=max_cost)
    try:
        return Budget(parameters=float(parse_count(max_parameters)))
    except ValueError as error:
        raise CommandFailed(f"--max-parameters: {error}.") from error


def _catalogue(config: Path | None) -> Catalogue | None:
    """The experts of the configuration that was named; None when none was."""
    from gateway.config import load_config

    return load_config(config).catalogue if config is not None else None


def _served(outcomes: Outcomes, catalogue: Catalogue) -> Outcomes:
    kept = [name for name in outcomes.experts if name in catalogue]
    if not kept:
        raise CommandFailed(
            f"that configuration has none of the data's experts: {', '.join(outcomes.experts)}."
        )
    gone = [name for name in outcomes.experts if name not in catalogue]
    if gone:
        print(f"left out, not in the configuration: {', '.join(gone)}", file=sys.stderr)
    return outcomes.for_experts(kept)


def _version(file: Path, config: Path | None) -> Version:
    """The file's text, checked against the experts of coe.yaml."""
    from experts.strict_yaml import read_bounded
    from gateway.policy_versions import TEXT_BYTES_MAX, Version
    from policies.loader import parse_policy

    loaded = configuration(config)
    text = read_bounded(file)
    if len(text.encode()) > TEXT_BYTES_MAX:
        raise CommandFailed(f"{file} has more than {TEXT_BYTES_MAX} bytes.")
    experts = loaded.catalogue.ids if loaded is not None else None
    policy = parse_policy(text, name=file.stem, file=str(file), catalogue_ids=experts)
    return Version(policy.digest, text, _now_ms())


def _change(
    name: str, order: Callable[[PolicyRecord], PolicyRecord], config: Path | None
) -> PolicyRecord:
    from gateway.policy_versions import check_name
    from gateway.state.policies import PolicyStore

    check_name(name)
    return with_store(
        config, configuration(config), lambda store: PolicyStore(store).change(name, order)
    )


def _tell(record: PolicyRecord) -> None:
    active = record.active or "the file's version"
    trial = f", canary {record.canary} for {100 * record.canary_share:g} % of sessions"
    print(f"{record.name}: {active} is in force{trial if record.canary else ''}")


def _now_ms() -> int:
    return int(time.time() * 1000)
