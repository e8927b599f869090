"""What belongs to a thread: its pass in progress, its newest plan, its changes for a block.

So threads may share one routed model, each with its own text, policy and budget.
"""

import contextlib
import threading
from threading import get_ident

from dlr.routing.plan import Plan


class ThreadState:
    """A mapping by thread for each of these. A copy of it (with the model) starts empty."""

    def __init__(self):
        self.passes: dict[int, Plan] = {}
        # what the model was called with, until its decoder is called
        self.asked: dict[int, dict] = {}
        self.plans: dict[int, Plan] = {}
        self.changes: dict[int, list[dict]] = {}
        self.newest: Plan | None = None

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()

    def forget_the_dead(self) -> None:
        """Drops what belongs to threads that have ended."""
        living = {thread.ident for thread in threading.enumerate()}
        for by_thread in (self.passes, self.asked, self.plans, self.changes):
            for dead in by_thread.keys() - living:
                del by_thread[dead]

    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's newest pass; where it has run none, of the newest of all."""
        return self.plans.get(get_ident(), self.newest)

    @plan.setter
    def plan(self, value: Plan) -> None:
        self.plans[get_ident()] = self.newest = value

    def changed(self, name: str, own):
        """The value that the innermost block of this thread gives `name`; `own` where none does."""
        for change in reversed(self.changes.get(get_ident(), ())):
            if name in change:
                return change[name]
        return own

    @contextlib.contextmanager
    def at(self, change: dict):
        """Lets `change` hold in this thread for the duration."""
        thread = get_ident()
        changes = self.changes.setdefault(thread, [])
        changes.append(change)
        try:
            yield
        finally:
            changes[:] = [other for other in changes if other is not change]
            if not changes and self.changes.get(thread) is changes:
                del self.changes[thread]
