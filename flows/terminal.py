"""What a person sees on the terminal while a flow runs from the command line."""

from __future__ import annotations

import logging

from prefect.logging.handlers import PrefectConsoleHandler

from rollout.errors import RolloutError

_FLOW_RUNS = "prefect.flow_runs"


class Terminal(PrefectConsoleHandler):
    """Prefect's terminal log without what would tell an error of ours a second and a third time.

    Such an error says what, where and what to do: the line of the step that met it stays, and the command ends with
    it. Prefect adds a traceback and the state of the flow run. Both are shown with PREFECT_LOGGING_LEVEL=DEBUG, and the
    Prefect UI has them in any case. The traceback of any other exception always stays: that is a bug.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        # The loggers have no level of their own: this asks for the level of Prefect.
        return super().filter(record) and (logging.getLogger("prefect").isEnabledFor(logging.DEBUG) or _is_new(record))


def _is_new(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], RolloutError):
        return False
    return not (record.name == _FLOW_RUNS and record.getMessage().startswith("Finished in state Failed("))
