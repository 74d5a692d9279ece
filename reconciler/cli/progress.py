"""What is shown while work goes on: bars on a terminal, else a line per event. All on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reconciler.cli.options import Manner, say
from reconciler.cli.terminal import coloured, paint
from reconciler.core.call import Call, CallState
from reconciler.execute import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from reconciler.core.actual import Actual
    from reconciler.core.ledger import Telemetry
    from reconciler.core.plan import Plan


class Display:
    """Told of each step as it happens, from any thread but one at a time."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.live = enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.progress: Progress | None = None
        self.bars: dict[str, TaskID] = {}
        self.said: dict[str, int] = {}

    def begin(self) -> None:
        """Nothing is drawn before there is something to show."""

    def _bars(self) -> Progress:
        if self.progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.progress.start()
        return self.progress

    def step(self, step: Step) -> None:
        """One action has ended."""
        if not self.enabled or (Manner.quiet and step.ok):
            return
        disk = f" disk {step.action.disk}" if step.action.disk is not None else ""
        self._line(f"{step.action.vm}{disk}: {step.message}", good=step.ok)

    def ended(self, call: Call) -> None:
        """A run that was waited for has ended, by another's work."""
        good = call.state is CallState.COMPLETED
        if self.enabled and not (Manner.quiet and good):
            self._line(f"{call.vm}: run {call.run} is {call.state}: {call.message}", good=good)

    def _line(self, text: str, *, good: bool) -> None:
        line = f"{'ok ' if good else 'ERR'} {text}"
        line = paint(line, None if good else "red", coloured(sys.stderr))
        if self.progress:
            self.progress.console.print(line, highlight=False, markup=False)
        else:
            say(line, err=True, error=not good)

    def running(self, plan: Plan, actual: Actual, telemetry: Mapping[str, Telemetry]) -> None:
        """How far the appliances are, by their own word."""
        if not self.enabled or Manner.quiet:
            return
        for one in plan.vms:
            call = one.call
            if call is None or call.state is not CallState.ACCEPTED:
                bar = self.bars.pop(one.name, None)
                if bar is not None and self.progress:
                    self.progress.remove_task(bar)
                continue
            report = actual.reports.get(call.job_id)
            clients = sum(s.clients for s in actual.servers if s.mark.vm == one.name)
            said = telemetry.get(call.job_id)
            percent = said.percent if said else 0.0
            if report and report.percent is not None:
                percent = report.percent
            doing = report.message if report else said.phase if said else ""
            doing = doing or f"{clients} connections"
            self._tell(one.name, percent, doing)

    def _tell(self, vm: str, percent: float, doing: str) -> None:
        if self.live:
            bars = self._bars()
            if vm not in self.bars:
                self.bars[vm] = bars.add_task(vm, total=100.0)
            text = f"{vm}  {doing}".replace("[", "(").replace("]", ")")
            bars.update(self.bars[vm], completed=percent, description=text[:70])
        elif int(percent) // 10 != self.said.get(vm):
            self.said[vm] = int(percent) // 10
            say(f"... {vm}: {percent:.0f} %  {doing}", err=True)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self.progress:
            self.progress.stop()
            self.progress = None
            self.bars.clear()
