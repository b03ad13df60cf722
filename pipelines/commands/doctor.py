"""`arlon doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from arlon.errors import UsageError
from pipelines.commands.common import FAILED, reported
from pipelines.commands.options import (
    DtypeOption,
    HeightOption,
    JsonOption,
    SetOption,
    WidthOption,
    read_assignments,
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="What a model needs: its name, folder or file, or opensora_v1_2 for the full size."
        ),
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    duration: Annotated[
        str | None, typer.Option("--duration", help='Length of the film: seconds, or "36f" frames. [default: 5]')
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where it would run: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[DtypeOption, typer.Option("--dtype", help="Precision it would run in.")] = DtypeOption.float32,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Examine this machine (devices, memory, codecs) and whether a film fits. Nothing is loaded or downloaded."""
    with reported():
        if model is None and (assignments or not height is width is duration is None):
            raise UsageError("--height, --width, --duration and --set say what film is meant: give --model too")
        from pipelines.doctor.diagnosis import check_fit, fit_lines, to_plain
        from pipelines.doctor.machine import examine, machine_lines

        values, settings = read_assignments(assignments or ())
        report = None
        if model is not None:
            report = check_fit(
                model,
                height=height,
                width=width,
                duration=duration,
                device=device,
                dtype=dtype.value,
                values=values,
                settings=settings,
            )
        machine = examine()
        if as_json:
            typer.echo(json.dumps(to_plain(machine, report), indent=2, ensure_ascii=False))
        else:
            rates = {here.name: here.flops_per_s for here in machine.devices}
            lines = machine_lines(machine)
            if report is not None:
                lines += fit_lines(report, rates.get(report.device.name, {}))
            for name, text in lines:
                typer.echo(f"{name:<14}{text}")
        if machine.video or (report is not None and (report.fits is False or report.text_encoder == "missing")):
            raise typer.Exit(FAILED)
