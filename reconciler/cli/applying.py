"""apply, stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click
from msgspec.structs import replace

from reconciler.cli import options, tables, text
from reconciler.cli.progress import Display
from reconciler.cli.saving import Question, Renewed, read
from reconciler.core.actions import Conclude, Notify
from reconciler.core.actual import Actual
from reconciler.core.call import CallState
from reconciler.core.errors import Exit, HostError, ReconcilerError
from reconciler.core.plan import Plan, diagnostics_json, subject_json
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds, format_duration
from reconciler.execute import Step
from reconciler.handover import AnyOrder, Apply, Asked, Carry, Line, Remote, Specs, Stop, found
from reconciler.host import lock, store
from reconciler.look import Observer
from reconciler.loop import (
    Applier,
    Outcome,
    current,
    dry_run,
    load_settings,
)
from reconciler.orders import Cancel

if TYPE_CHECKING:
    from reconciler.cli.hearing import WaitingEars

DRAIN_LOOK: Final[Seconds] = 0.5
"""Between two looks at clients that are to leave."""
NEWS: Final[Seconds] = 0.5
"""Between two looks at whether anything was written down about a run that is waited for."""


@click.command()
@click.argument(
    "saved",
    required=False,
    metavar="[FILE]",
    type=click.Path(dir_okay=False, path_type=Path),
)
@options.specs
@options.extra_vars
@options.choice
@options.diff
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--wait", is_flag=True, help="Stay until the runs have ended.")
@click.option("--timeout", type=options.Duration(), help="With --wait: how long. [default: ever]")
@click.option(
    "--prune", is_flag=True, help="Also take down what was applied once and no spec names now."
)
@options.drain_timeout
@options.lock_timeout
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write how it went there, for node_exporter's textfile collector.",
)
@options.output("text", "json")
@options.quiet
@click.pass_obj
def apply(
    config: str | None,
    saved: Path | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    selector: str | None,
    patterns: tuple[str, ...],
    diff: bool,
    yes: bool,
    wait: bool,
    timeout: float | None,
    prune: bool,
    drain_timeout: float,
    lock_timeout: float,
    textfile: Path | None,
    output: str,
) -> int:
    """Make the specs true: servers, ports, and one call per VM.

    Applying again changes nothing. What fails leaves the rest up, and the next apply goes on
    from there. FILE is a plan saved by `plan --out`: exactly that is done, once, without a
    question, or nothing if what it rests on has moved.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    settings = load_settings(config, os.environ)
    if saved and (files or extra or patterns or selector or prune or drain_timeout):
        raise click.UsageError(
            "a saved plan says all that is to be done: it goes with none of -f, -e, -l, --vm, "
            "--prune, --drain-timeout"
        )
    session = Session(settings, "reconciler apply", lock_timeout, quiet=output == "json", diff=diff)
    with session.measured(textfile) as ended:
        if saved:
            renewed = Renewed(read(saved), settings)
            wanted, session.recheck = renewed.asked(), renewed.recheck
            source = renewed.source
        else:
            question = Question(
                files=files, extra=extra, prune=prune, patterns=patterns, selector=selector
            )
            source = question.source(settings)
            names = question.chosen(source, settings)
            wish = Specs.of(source, prune=prune, chosen=names)
            wanted = Asked(wish, wish.desire(settings, source))
        session.sources = source.lines
        session.applier.remember = source.remember
        code = session.carry_out(
            wanted,
            output,
            yes=yes or bool(saved),
            wait=wait,
            timeout=timeout,
            drain=drain_timeout,
        )
        ended(code)
    return code


@click.command()
@click.argument("vms", nargs=-1, required=True, metavar="VM…")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--kill-clients", is_flag=True, help="Cut off clients that are connected.")
@click.option(
    "--cancel-run",
    is_flag=True,
    help="End a run that an appliance may be writing; it cannot be told, and may go on trying.",
)
@options.drain_timeout
@options.lock_timeout
@options.quiet
@click.pass_obj
def stop(
    config: str | None,
    vms: tuple[str, ...],
    yes: bool,
    kill_clients: bool,
    cancel_run: bool,
    drain_timeout: float,
    lock_timeout: float,
) -> int:
    """Stop the exports of VMs, whatever the specs say. Images and history stay.

    A server that a client is using, or whose run an appliance may be writing, is held unless the
    options say otherwise. The next apply of a spec that says `exported` starts them again, unless
    the run has ended.
    """
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler stop", lock_timeout)

    wish = Stop(vms=vms, kill_clients=kill_clients)
    wanted = Asked(wish, wish.desire(settings))
    if cancel_run:
        session.cancel_runs(vms, kill_clients=kill_clients, yes=yes)
        yes = True
    outcome = session.apply(wanted, yes=yes, order=True)
    if outcome is None:
        options.say("nothing was changed", err=True)
        return Exit.OK
    outcome = session.drain(wanted, outcome, drain_timeout, order=True)
    session.report(outcome, "text")
    return session.signal_code or outcome.exit_code()


class _DaemonCame(Exception):  # noqa: N818 no fault
    """While we waited for the hub, a daemon took it."""


def _sides(step: Step, planned: Plan) -> dict[str, Any]:
    """Before and after of a step of a plan."""
    from reconciler.core.sides import sides

    one = next((one for one in planned.vms if one.name == step.action.vm), None)
    both = sides(step.action, one, planned) if one else None
    return both.to_json() if both else {"before": None, "after": None}


def in_the_way(outcome: Outcome) -> list[str]:
    """The VMs of which clients hold a stop."""
    found = (action.vm for action in outcome.plan.actions if action.cause == "InUse")
    return list(dict.fromkeys(found))


class Session:
    """One command's work on the hub, with what a person sees of it."""

    def __init__(
        self,
        settings: Settings,
        command: str,
        lock_timeout: Seconds,
        *,
        quiet: bool = False,
        diff: bool = False,
    ) -> None:
        self.settings = settings
        self.quiet, self.diff = quiet, diff
        self.began = time.time()
        self.recheck: Callable[[], None] = lambda: None
        """Raises StalePlanError if what a saved plan was made of has moved."""
        self.sides: dict[int, dict[str, Any]] = {}
        """Number of a step → before and after of it, where that was asked for."""
        self.display = Display(enabled=not quiet)
        self.applier = Applier(
            settings,
            os.environ,
            emit=self.emit,
            command=options.who(command),
            lock_timeout=lock_timeout,
            waiting=self.waiting,
            looked=self.looked,
        )
        self.sources: Mapping[str, str] = {}
        """File → its text, to show what a finding is about."""
        self.signal_code: int | None = None
        self.steps: list[Step] = []
        """Everything that was done, over all passes."""
        self.last: tuple[Plan, Actual] | None = None
        self.verdicts: Mapping[str, Exit] = {}
        """VM → how it stands at the end."""

    def emit(self, step: Step) -> None:
        if self.diff and self.last:
            self.sides[len(self.steps)] = _sides(step, self.last[0])
        self.steps.append(step)
        self.display.step(step)

    def looked(self, planned: Plan, actual: Actual) -> None:
        self.last = (planned, actual)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """A signal in the middle of work ends what was begun, in order; elsewhere it ends us."""

        def handle(number: int, frame: FrameType | None) -> None:
            interrupt = number == signal.SIGINT
            self.signal_code = Exit.INTERRUPTED if interrupt else Exit.TERMINATED
            self.applier.stopping.set()
            if self.applier.executing:
                options.say("ending what was begun …", err=True)
                return
            if interrupt:
                raise KeyboardInterrupt
            from reconciler.cli.main import Terminated

            raise Terminated

        before = {one: signal.signal(one, handle) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def carry_out(
        self,
        wanted: Asked,
        output: str,
        *,
        yes: bool,
        wait: bool,
        timeout: Seconds | None,
        drain: Seconds = 0.0,
    ) -> int:
        """Apply, stay if asked to, and tell how it ended; the exit code."""
        ears = self.ears() if wait else None
        with ears or nullcontext():
            outcome = self.apply(wanted, yes=yes)
            if outcome is None:
                options.say("nothing was changed", err=True)
                return Exit.OK
            outcome = self.drain(wanted, outcome, drain)
            code: int = outcome.exit_code()
            if ears and not outcome.interrupted:
                outcome, timed_out = self.stay(wanted, outcome, timeout, ears)
                code = Exit.TIMED_OUT if timed_out else outcome.exit_code()
        self.verdicts = outcome.verdicts()
        self.report(outcome, output)
        return self.signal_code or code

    @contextmanager
    def measured(self, path: Path | None) -> Iterator[Callable[[int], None]]:
        """Write at the end how it went, whatever the end is. The exit code is told, or an error's.

        What cannot be written is said, and changes nothing: backups are not for the figures.
        """
        codes: list[int] = []
        try:
            yield codes.append
        except ReconcilerError as error:
            codes.append(error.exit)
            raise
        finally:
            if path:
                self._measure(path, codes[0] if codes else self.signal_code or Exit.ERROR)

    def _measure(self, path: Path, code: int) -> None:
        from reconciler import textfile  # only who asks for it loads what writes it

        try:
            textfile.write(path, self.settings.hub, code, self.verdicts, self.steps, time.time())
        except HostError as error:
            options.say(f"warning: {error}", err=True)

    def apply(self, wanted: Asked, *, yes: bool, order: bool = False) -> Outcome | None:
        """Show, ask if asked to, do."""
        shown: list[str] = []
        if not yes:
            planned = dry_run(self.settings, wanted, os.environ)
            shown.append(self.show(planned))
            if planned.changes and not self.ask(planned):
                return None

        def approved(planned: Plan) -> bool:
            self.recheck()
            if wanted.promise:
                self.show(wanted.promise.saved.basis.plan)
                return True
            rendered = text.plan_text(planned)
            if shown and rendered != shown[-1]:
                options.say("what is there has changed since you were asked:\n", err=True)
                shown.append(self.show(planned))
                return not planned.changes or self.ask(planned)
            if not shown:
                self.show(planned)
            return True

        with self.signals():
            self.display.begin()
            try:
                return self.apply_once(wanted, approved=approved, order=order)
            finally:
                self.display.end()

    def apply_once(
        self,
        wanted: Asked,
        *,
        approved: Callable[[Plan], bool] = lambda _: True,
        impatient: bool = True,
        order: bool = False,
    ) -> Outcome | None:
        """One apply: by the daemon that holds the hub, or by ourselves."""
        try:
            if line := found(Path(self.settings.state)):
                return self.handed(line, wanted, approved, impatient=impatient, order=order)
            return self.applier.apply(
                wanted,
                approved=approved,
                impatient=impatient,
                order=order,
                promise=wanted.promise,
            )
        except _DaemonCame:
            return self.apply_once(wanted, approved=approved, impatient=impatient, order=order)

    def handed(
        self,
        line: Line,
        wanted: Asked,
        approved: Callable[[Plan], bool],
        *,
        impatient: bool,
        order: bool,
    ) -> Outcome | None:
        """The same, by the daemon at the other end of a line."""
        request = Apply(
            wish=wanted.wish,
            settings=self.settings.to_json(),
            command=self.applier.command,
            lock_timeout=self.applier.lock_timeout,
            impatient=impatient,
            order=order,
            drained=wanted.drained,
            promise=wanted.promise,
        )
        self.applier.executing = True  # a signal is told to it, and ends what it has begun
        try:
            with closing(line):
                return self.remote(line).apply(request, approved)
        finally:
            self.applier.executing = False

    def remote(self, line: Line) -> Remote:
        return Remote(
            line,
            emit=self.emit,
            looked=self.looked,
            say=lambda text: options.say(text, err=True),
            stopping=self.applier.stopping,
        )

    def order(self, order: AnyOrder) -> list[str]:
        """Carry out an order about what is remembered; what to tell the operator."""
        applier = self.applier
        try:
            if line := found(Path(self.settings.state)):
                request = Carry(
                    order=order,
                    settings=self.settings.to_json(),
                    command=applier.command,
                    lock_timeout=applier.lock_timeout,
                )
                with closing(line):
                    return self.remote(line).carry(request)
            with applier.opened() as store:
                eyes = Observer(self.settings, os.environ)
                return order.carry_out(store, applier.command, time.time(), eyes)
        except _DaemonCame:
            return self.order(order)

    def waiting(self, holder: lock.Holder | None) -> None:
        """Another holds the hub: one that work can be handed to, or one that will be done soon."""
        if line := found(Path(self.settings.state)):
            line.close()
            raise _DaemonCame
        options.say(f"waiting for {holder} …", err=True)

    def show(self, planned: Plan) -> str:
        if options.Manner.quiet:
            errors = [one for one in planned.diagnostics if one.severity == "error"]
            colour, width = tables.coloured(sys.stderr), tables.width_of(sys.stderr)
            for line in text.findings(errors, self.sources, colour=colour, width=width):
                options.say(line, error=True)
            return text.plan_text(planned)
        out = sys.stderr if self.quiet else sys.stdout
        if not self.quiet or options.can_ask():
            colour = tables.coloured(out)
            said = text.plan_text(planned, colour=colour, sources=self.sources, diff=self.diff)
            options.say(said + "\n", err=self.quiet)
        return text.plan_text(planned)

    def ask(self, planned: Plan) -> bool:
        if options.Manner.quiet:
            raise click.UsageError("--quiet asks nothing: add -y to apply this plan")
        if not options.can_ask():
            raise click.UsageError("cannot ask without a terminal: add -y to apply this plan")
        return click.confirm("Apply this?", default=False, err=True)

    def cancel_runs(self, vms: Sequence[str], *, kill_clients: bool, yes: bool) -> None:
        """End the active runs of some VMs by an operator's order."""
        order = Cancel(vms=tuple(vms), kill_clients=kill_clients)
        ledger = current(self.settings)
        order.refuse_early(ledger, Observer(self.settings, os.environ))
        calls = [call for call in map(ledger.active, vms) if call]
        for call in calls:
            options.say(
                f"{call.vm}: run {call.run} is {call.state}; it ends as CANCELLED. SNA "
                f"{call.sna} cannot be told, and its writer will find nothing.",
                err=True,
            )
        if calls and not yes and not options.confirmed("Do this?"):
            raise click.Abort
        self.order(order)

    def drain(
        self, wanted: Asked, outcome: Outcome, timeout: Seconds, *, order: bool = False
    ) -> Outcome:
        """Give clients that hold a stop some time to leave; what they still hold then, is held.

        The lock is free meanwhile, so that nobody else waits for them.
        """
        deadline = time.monotonic() + timeout
        if not timeout or not in_the_way(outcome):
            return outcome
        options.say(
            f"waiting up to {format_duration(timeout)} for the clients of "
            f"{', '.join(in_the_way(outcome))} to leave …",
            err=True,
        )

        at_last = replace(wanted, drained=timeout)
        with self.signals():
            while in_the_way(outcome) and not self.applier.stopping.is_set():
                left = deadline - time.monotonic()
                if self.applier.stopping.wait(max(0.0, min(DRAIN_LOOK, left))):
                    break
                wish = wanted if left > 0 else at_last
                again = self.apply_once(wish, impatient=False, order=order)
                assert again is not None
                outcome = again
                if left <= 0:
                    break
        return outcome

    def ears(self) -> WaitingEars:
        """For callbacks, which may come before the answer to the call."""
        from reconciler.cli.hearing import WaitingEars  # only who waits takes callbacks

        return WaitingEars(self.settings, self.applier.command)

    def stay(
        self, wanted: Asked, outcome: Outcome, timeout: Seconds | None, ears: WaitingEars
    ) -> tuple[Outcome, bool]:
        """Look again until no run of the VMs is open; (last outcome, whether time ran out)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        told = False
        open_before: Collection[str] = [one.name for one in outcome.plan.vms]
        if wanted.promise:
            wanted = replace(wanted, promise=replace(wanted.promise, begun=True))
        with self.signals():
            self.display.begin()
            try:
                while True:
                    waits = self.open_runs(outcome)
                    self.tell_ends(outcome, set(open_before) - waits.keys())
                    open_before = waits
                    if not waits:
                        return outcome, False
                    if deadline is not None and time.monotonic() >= deadline:
                        options.say(
                            f"not waiting any longer than {format_duration(timeout or 0)}; still "
                            f"open: {', '.join(sorted(waits))}",
                            err=True,
                            error=True,
                        )
                        options.say(f"next: reconciler explain {min(waits)}", err=True, error=True)
                        return outcome, True
                    if self.applier.stopping.is_set():
                        return outcome, False
                    ears.listen()
                    if not told and (deaf := self.deaf(waits, ears)):
                        told = True
                        options.say(deaf, err=True)
                    pause = min(self.settings.snas[sna].poll for sna in waits.values())
                    if deadline is not None:
                        pause = min(pause, max(0.05, deadline - time.monotonic()))
                    try:
                        self.await_news(waits, pause, ears)
                        next_one = self.apply_once(wanted, impatient=False)
                        telemetry = current(self.settings).telemetry
                    except HostError as error:
                        options.say(f"warning: {error}; looking again", err=True)
                        self.applier.stopping.wait(NEWS)
                        continue
                    assert next_one is not None
                    outcome = next_one
                    if self.last:
                        self.display.running(*self.last, telemetry)
            finally:
                self.display.end()

    def await_news(self, vms: Collection[str], longest: Seconds, ears: WaitingEars) -> None:
        """Wait until there is a reason to look at these VMs: a callback that we took, or a step of
        a run that whoever takes them instead of us has written down."""
        state = Path(self.settings.state)
        before = store.steps(state, vms)
        end = time.monotonic() + longest
        while (left := end - time.monotonic()) > 0 and not self.applier.stopping.is_set():
            if ears.kicked.wait(min(left, NEWS)) or store.steps(state, vms) != before:
                break
        ears.kicked.clear()  # before looking, so that no kick is lost

    def tell_ends(self, outcome: Outcome, vms: Collection[str]) -> None:
        """How these VMs' runs have ended since we began, where it was not we who ended them."""
        ours = {step.action.vm for step in self.steps if isinstance(step.action, Conclude)}
        for vm, call in sorted(outcome.calls().items()):
            if vm in vms and vm not in ours and call.state.terminal and call.ended >= self.began:
                self.display.ended(call)

    def begun_meanwhile(self, outcome: Outcome) -> Iterator[str]:
        """Runs that somebody else, who watches, has begun since we began: no changes were ours."""
        ours = {step.action.vm for step in self.steps if isinstance(step.action, Notify)}
        for vm, call in sorted(outcome.calls().items()):
            if vm not in ours and call.state.active and call.called >= self.began:
                holder = lock.holder(Path(self.settings.state) / "lock")
                who = f" by {holder}" if holder else ""
                yield f"{vm}: run {call.run} was begun meanwhile{who}: it is {call.state}"

    def open_runs(self, outcome: Outcome) -> Mapping[str, str]:
        """VM → SNA of the runs that may still end by themselves."""
        found = {}
        for one in outcome.plan.vms:
            call = outcome.calls().get(one.name)
            wants = one.vm.exported and one.vm.purpose == "backup"
            if call and call.state in (CallState.ACCEPTED, CallState.UNKNOWN):
                found[one.name] = call.sna
            elif wants and any(action.kind == "wait" for action in one.actions):
                found[one.name] = one.vm.sna
        return found

    def deaf(self, waits: Mapping[str, str], ears: WaitingEars) -> str | None:
        """What to say if it is not the appliance that says how these runs end."""
        silent = sorted({sna for sna in waits.values() if not self.settings.snas[sna].reports_end})
        if not silent:
            return None
        names = f"waiting; SNA {', '.join(silent)} does not report the end of runs"
        if ears.hears:
            return (
                f"{names} by its status, so one ends when the client has reported every disk to "
                f"http://{ears.endpoint}; if it falls silent: `reconciler explain VM`, and "
                "`reconciler resolve VM --failed --reason WHY` (or --completed)"
            )
        return (
            f"{names} (`reports_end: true` in the config says that one does), and callbacks are "
            "not heard, so this goes on until `reconciler resolve VM --failed --reason WHY` (or "
            "--completed) or --timeout"
        )

    def report(self, outcome: Outcome, output: str) -> None:
        """How it ended."""
        if output == "json":
            from reconciler.core.status import document

            assert self.last is not None
            planned, actual = self.last
            value: dict[str, Any] = document(planned, actual, current(self.settings), time.time())
            value["steps"] = [
                {
                    **subject_json(step.action.vm),
                    "disk": None if step.action.disk is None else str(step.action.disk),
                    "action": step.action.kind,
                    "ok": step.ok,
                    "reason": step.reason,
                    "message": step.message,
                    **self.sides.get(number, {}),
                }
                for number, step in enumerate(self.steps)
            ]
            value["diagnostics"] = diagnostics_json(outcome.plan.diagnostics, self.sources)
            options.print_json(value)
            return
        failed = [step for step in outcome.steps if not step.ok and step.reason != "PortTaken"]
        done = len([step for step in self.steps if step.ok])
        lines: list[str] = []
        verdicts = outcome.verdicts()
        for one in outcome.plan.all:
            if verdicts[one.name] is Exit.OK:
                continue
            for action in one.actions:
                if action.kind in ("wait", "hold", "refuse"):
                    where = f" disk {action.disk}" if action.disk is not None else ""
                    lines.append(f"{one.name}{where}: {action.kind}: {action.cause}: {action.why}")
            if one.lost_run:
                lines.append(f"{one.name}: {one.lost_run}")
        for line in dict.fromkeys(lines):
            options.say(line, error=True)
        for line in self.begun_meanwhile(outcome):
            options.say(line)
        fine = sum(verdict is Exit.OK for verdict in verdicts.values())
        total = len(outcome.plan.all)
        if done or failed or lines:
            options.say(
                f"{done} step{'s' if done != 1 else ''} done, {len(failed)} failed; "
                f"{fine} of {text.things(outcome.plan)} as declared."
            )
            if fine < total:
                name = next(vm for vm, verdict in verdicts.items() if verdict is not Exit.OK)
                options.say(f"next: reconciler explain {name}")
