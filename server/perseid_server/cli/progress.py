"""What a run of training shows on a terminal."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from perseid_router.training.trainer import StepReport
    from perseid_server.training.joint import JointReport
    from perseid_server.training.medusa.heads import StepReport as HeadsStepReport
    from perseid_server.training.medusa.run import Listener as MedusaListener
    from perseid_server.training.run import Listener


class ProgressDisplay:
    """A bar for each stage, on standard error; steps tell loss and accuracy."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._progress.stop()

    def medusa_listener(self) -> "MedusaListener":
        """What a run that trains Medusa heads reports to."""
        from perseid_server.training.medusa.run import Listener  # noqa: PLC0415  imports torch

        return Listener(self._heads_stepped, self._told)

    def listener(self) -> "Listener":
        """What a run that trains gates reports to."""
        from perseid_server.training.run import Listener  # noqa: PLC0415  imports torch

        return Listener(self._stepped, self._joint_stepped, self._told)

    def _stepped(self, step: int, steps: int, report: "StepReport") -> None:
        self._show("training", step, steps, f"loss {report.loss:.3f}, {100 * report.accuracy:.1f} % right")

    def _joint_stepped(self, step: int, steps: int, report: "JointReport") -> None:
        self._show("joint stage", step, steps, f"text {report.language:.3f}, gates {report.gates:.3f}")

    def _heads_stepped(self, step: int, steps: int, report: "HeadsStepReport") -> None:
        self._show("training", step, steps, "loss of each head " + " ".join(f"{loss:.2f}" for loss in report.losses))

    def _told(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "")

    def _show(self, what: str, done: int, total: int, note: str) -> None:
        if not self._bars:
            self._progress.start()  # with the first stage: an error before it is one line, without an empty bar
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._bars[what], completed=done, note=note)
