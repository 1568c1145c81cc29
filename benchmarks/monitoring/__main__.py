"""Whether thresholds with a criterion hold what they promise, with the reference method beside every run.

    python -m benchmarks.monitoring simulate FOLDER                     (about half an hour on one core)
    python -m benchmarks.monitoring committee FOLDER 'MEMBERS_*.model'  (about as long; may be left out)
    python -m benchmarks.monitoring report FOLDER [--out benchmarks/results/monitoring]

The embedded MACE of malonaldehyde was trained on GFN2-xTB at 300 K, and GFN2-xTB is fast enough to say of its runs
how wrong the forces were. `simulate` makes, labels and stores: reference runs at 300 K and perturbed frames, of which
all thresholds are made; fresh ones of both, on which promises are checked; runs that are heated and runs from
perturbed starts, in which the potential fails. `committee` reads the stored positions with the members that
`benchmarks/train_committee.py malonaldehyde` trains. `report` replays the readings through the rules, in a minute,
and writes OUT.md, OUT.csv and OUT_*.png. An ensemble that FOLDER has already is kept.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.monitoring.figures import PICTURES, draw_example, draw_false_alarms, draw_lead_times
from benchmarks.monitoring.judging import (
    Data,
    failing_runs,
    false_alarms,
)
from benchmarks.monitoring.promises import guarantees
from benchmarks.monitoring.runs import (
    COMMITTEE,
    ENSEMBLES,
)
from benchmarks.monitoring.simulation import read_committee, simulate
from benchmarks.monitoring.tables import markdown, write_csv


def report(folder: Path, out: Path) -> None:
    data = Data(folder)
    alarms = false_alarms(data)
    failing, leads = failing_runs(data)
    rows = [*alarms, *failing, *guarantees(data)]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(data, rows, out)
    out.with_suffix(".md").write_text(text)
    write_csv(out.with_suffix(".csv"), rows)
    figures = (draw_example(data), draw_false_alarms(data, rows), draw_lead_times(data, leads))
    for what, figure in zip(PICTURES, figures, strict=True):
        figure.savefig(out.with_name(f"{out.name}_{what}.png"), dpi=150)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage in ("simulate", COMMITTEE, "report"):
        stages.add_parser(stage).add_argument("folder", type=Path)
    stages.choices["simulate"].add_argument("--only", nargs="+", choices=ENSEMBLES, default=list(ENSEMBLES))
    stages.choices[COMMITTEE].add_argument("members", help="pattern of the members' files, in quotes")
    stages.choices["report"].add_argument("--out", type=Path, default=Path("benchmarks/results/monitoring"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    match arguments.stage:
        case "simulate":
            simulate(arguments.folder, arguments.only)
        case "committee":
            read_committee(arguments.folder, arguments.members)
        case _:
            report(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
