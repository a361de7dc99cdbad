"""The command line: `python -m examples.lm compare`, `train --optimizer sophia_g`, `plan`, ...."""

import sys

import tyro

from examples.lm import compare, generate, hosts, plan, tune
from examples.lm.config import CompareConfig, TrainConfig, UsageError

COMMANDS = {
    CompareConfig: compare.compare,
    TrainConfig: compare.train,
    generate.GenerateConfig: generate.generate,
    plan.PlanConfig: plan.plan,
    tune.TuneConfig: tune.tune,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "compare": CompareConfig,
            "train": TrainConfig,
            "generate": generate.GenerateConfig,
            "plan": plan.PlanConfig,
            "tune": tune.TuneConfig,
        },
        args=arguments,
        prog="python -m examples.lm",
    )
    try:
        COMMANDS[type(config)](config)
    except UsageError as error:
        print(error, file=sys.stderr)
        return hosts.leave(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
