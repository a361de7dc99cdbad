"""The command line: `python -m examples.lm compare`, `train --optimizer sophia_g`, `plan`, ...."""

import sys
from typing import Any

import tyro

from . import compare, generate, hosts, plan, record, tune
from .config import CompareConfig, TrainConfig, TuneConfig, UsageError, check

COMMANDS = {
    CompareConfig: compare.compare,
    TrainConfig: compare.train,
    generate.GenerateConfig: generate.generate,
    plan.PlanConfig: plan.plan,
    TuneConfig: tune.tune,
}


PROGRAM = f"python -m {__package__}"  # of a copy of this folder, its own name


def parse(arguments: list[str]) -> Any:
    """One command's configuration. With `--resume` the run's own settings are the defaults."""
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "compare": CompareConfig,
            "train": TrainConfig,
            "generate": generate.GenerateConfig,
            "plan": plan.PlanConfig,
            "tune": TuneConfig,
        },
        args=arguments,
        prog=PROGRAM,
    )
    if not getattr(config, "resume", False):
        return config
    kind, command = type(config), arguments[0]
    default = record.stored(kind, config.out)
    return tyro.cli(kind, default=default, args=arguments[1:], prog=f"{PROGRAM} {command}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        check(config)
        COMMANDS[type(config)](config)
    except UsageError as error:
        print(error, file=sys.stderr)
        return hosts.exit_with(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return hosts.exit_with(130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
