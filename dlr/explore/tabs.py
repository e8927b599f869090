"""The explorer's other tabs: two plans side by side, and generation; and the three together.

    from dlr.explore.tabs import Workbench
    Workbench()
"""

import asyncio
from pathlib import Path

import ipywidgets as W

from dlr.explore import html
from dlr.explore.opening import sources
from dlr.explore.session import Session
from dlr.explore.stream import Progress, generate
from dlr.explore.widgets import (FIRST, WIDE, Explorer, Later, Quiet, budget_slider, column,
                                 guarded, text_area, view_area)
from dlr.measure.record import Record
from dlr.runs import results_folder, slug, write_atomically

ROUTER, STATIC = "router", "best static plan at the same skip"


class Comparison(Quiet, W.VBox):
    """Two checkpoints, two budgets, or the router against its best static plan, on one text.

    Args:
        checkpoint: of the first side; the second starts with the same one.
        session: a session to share; it is not closed with the comparison.
        base, loading: see `dlr.explore.session.Session`.
    """

    def __init__(self, checkpoint=None, text: str | None = None, session: Session | None = None,
                 base: str | None = None, **loading):
        self.error: Exception | None = None
        self.records: tuple[Record, Record] | None = None
        self._owned = session is None
        self._loading = loading
        first = session or Session(checkpoint, base, **loading)
        self._sessions = {"first": first, "second": first}
        self.source = first.source
        self._build(first, FIRST if text is None else text)
        super().__init__([self.controls, self.downloads, self.view], layout={"width": "100%"})
        self._later = Later(self.read)
        for widget in (self.text, *self.budgets.values(), self.plan):
            widget.observe(lambda _: self._later(), "value")
        self.picker.observe(lambda _: self._pick(), "value")
        self.save.on_click(lambda _: self.export())
        self.read()

    def _build(self, first: Session, text: str) -> None:
        self.text = text_area(text, "text to compare on")
        self.budgets = {side: budget_slider(first) for side in ("first", "second")}
        self.budgets["second"].value = max(0, self.budgets["first"].value - 15)
        self._sources = sources(first.name, first.source)
        self.picker = W.Dropdown(options=list(self._sources), value=first.name, layout=WIDE)
        self.plan = W.Dropdown(options=[ROUTER, STATIC], value=ROUTER, layout=WIDE)
        self.save = W.Button(description="Export HTML", icon="download")
        self.downloads, self.view = W.HTML(), view_area()
        self.controls = W.HBox([
            column("46%", (self.text, "Text")),
            column("27%", (self.budgets["first"], f"First: {ROUTER}, budget %"),
                   (self.budgets["second"], "Second: budget %")),
            column("27%", (self.picker, "Second: checkpoint"), (self.plan, "Second: plan"),
                   self.save)])

    @guarded
    def _pick(self) -> None:
        first, before = self._sessions["first"], self._sessions["second"]
        if self.picker.value == before.name:
            return
        try:
            self._sessions["second"] = first if self.picker.value == first.name else \
                Session(*self._sources[self.picker.value], **self._loading)
        except Exception:
            self.picker.value = before.name                 # the model is still that one
            raise
        if before is not first:
            before.close()
        self.read()

    def _side(self, side: str, first: Record | None = None) -> Record:
        """A side's record; the base model reads the text once where both sides share it."""
        session = self._sessions[side]
        threshold = session.threshold(self.budgets[side].value / 100)
        if first is not None and session is self._sessions["first"]:
            return session.again(first, threshold=threshold)
        return session.read(self.text.value, threshold=threshold, longest=html.LONGEST)

    @guarded
    def read(self) -> None:
        """Records both sides and draws them."""
        first = self._side("first")
        one, two = self._sessions["first"], self._sessions["second"]
        static = self.plan.value == STATIC
        self.budgets["second"].disabled = static
        if static:
            base = first if two is one else two.read(self.text.value, longest=html.LONGEST)
            second, what = two.static(base, first.skip_ratio)
            self.names = (f"{one.name}, router",
                          "best static plan" if what.startswith("best") else "static plan")
            note = (f"Second: {what}, on the router’s own weights; whole layers, so its skip ratio "
                    "is only near the first’s.")
        else:
            second, note = self._side("second", first), ""
            self.names = tuple(f"{session.name}, {self.budgets[side].value} %"
                               for side, session in self._sessions.items())
        self.records = (first, second)
        notes = dict.fromkeys(filter(None, [one.note, two.note, one.cut(first), note]))
        self.view.value = html.comparison(first, second, self.names,
                                           (one.flops(first), two.flops(second)),
                                           note=" ".join(notes))
        self.error = None

    def export(self, folder=None):
        """The comparison as one HTML file; returns its path."""
        try:
            if self.error is not None:
                raise ValueError("There is nothing to export: the view shows an error.")
            name = slug("-".join([self.records[0].meta["text_hash"], *self.names]))
            folder = Path(folder or results_folder() / "explorer" / "exports" / name)
            path = folder / "comparison.html"
            write_atomically(path, html.page(self.view.value, "Comparison"))
            self.downloads.value = html.saved([path])
            return path
        except Exception as error:
            self.downloads.value = html.message(error)

    def close(self) -> None:
        """Closes the widgets and frees the models it loaded."""
        self._later.cancel()
        first, second = self._sessions["first"], self._sessions["second"]
        if second is not first:
            second.close()
        if self._owned:
            first.close()
        super().close()


class Generator(Quiet, W.VBox):
    """A prompt in; its continuation token by token, each with its depth, dense beside routed.

    Args:
        session: a session to share; it is not closed with the tab.
        base, loading: see `dlr.explore.session.Session`.
    """

    def __init__(self, checkpoint=None, prompt: str = "The function returns",
                 session: Session | None = None, base: str | None = None, **loading):
        self.error: Exception | None = None
        self.progress: Progress | None = None
        self._task, self._stopped, self._seed = None, False, -1
        self._owned = session is None
        self.session = session or Session(checkpoint, base, **loading)
        self.source = self.session.source
        self.prompt = text_area(prompt, "prompt", height="72px")
        self.budget = budget_slider(self.session)
        self.tokens = W.IntSlider(value=60, min=5, max=400, layout=WIDE)
        self.temperature = W.FloatSlider(value=0.8, min=0.0, max=1.5, step=0.1, layout=WIDE)
        self.start = W.Button(description="Generate", icon="play", button_style="primary")
        self.stop = W.Button(description="Stop", icon="stop", disabled=True)
        self.view = view_area()
        controls = W.HBox([
            column("46%", (self.prompt, "Prompt"), W.HBox([self.start, self.stop])),
            column("27%", (self.budget, "Budget: gates to skip, %"), (self.tokens, "Tokens")),
            column("27%", (self.temperature, "Temperature"))])
        super().__init__([controls, self.view], layout={"width": "100%"})
        self.start.on_click(lambda _: self.run())
        self.stop.on_click(lambda _: self.halt())

    def run(self) -> None:
        """Generates: in a kernel as a task, so that Stop is heard; elsewhere to the end at once."""
        self._stopped, self._seed = False, self._seed + 1
        self.start.disabled, self.stop.disabled = True, False
        try:
            self._task = asyncio.get_running_loop().create_task(self._stream())
        except RuntimeError:
            asyncio.run(self._stream())

    def halt(self) -> None:
        """Ends the generation after the token in progress."""
        self._stopped = True

    async def _stream(self) -> None:
        try:
            threshold = self.session.threshold(self.budget.value / 100)
            for progress in generate(self.session, self.prompt.value, self.tokens.value, threshold,
                                     self.temperature.value, self._seed):
                self._draw(progress)
                if self._stopped:
                    progress.done = progress.stopped = True
                    self._draw(progress)
                    break
                await asyncio.sleep(0.005)          # lets the kernel hear the stop button
            self.error = None
        except Exception as error:                  # shown in the view; the next run works
            self.error, self.view.value = error, html.message(error)
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _draw(self, progress: Progress) -> None:
        self.progress = progress
        config = self.session.routing.config
        self.view.value = html.stream(progress, config.always_keep + config.keep_last)

    def close(self) -> None:
        """Stops, closes the widgets and frees the model."""
        self.halt()
        if self._task is not None:
            self._task.cancel()
        if self._owned:
            self.session.close()
        super().close()


class Workbench(Quiet, W.Tab):
    """Explore, Compare and Generate as tabs, each with a copy of the model. The later two are made
    when opened, and made again if the explorer has another checkpoint by then.

    Args:
        base, loading: see `dlr.explore.session.Session`.

    Raises:
        FileNotFoundError: there is no such checkpoint; the message names those there are.
    """

    def __init__(self, checkpoint=None, text: str | None = None, base: str | None = None,
                 **loading):
        self._loading = loading
        self.explorer = Explorer(checkpoint, text, base=base, **loading)
        self.comparison: Comparison | None = None
        self.generator: Generator | None = None
        super().__init__([self.explorer, W.VBox(), W.VBox()],
                         titles=("Explore", "Compare", "Generate"))
        self.observe(lambda _: self._open(), "selected_index")

    def _open(self) -> None:
        """Builds the chosen tab on the explorer's checkpoint; an error shows in its place."""
        source = self.explorer.session.source
        tabs = list(self.children)
        try:
            if self.selected_index == 1 and self._stale(self.comparison, source):
                tabs[1] = self.comparison = Comparison(
                    source[0], self.explorer.text.value, base=source[1], **self._loading)
            elif self.selected_index == 2 and self._stale(self.generator, source):
                tabs[2] = self.generator = Generator(
                    source[0], base=source[1], **self._loading)
        except Exception as error:
            tabs[self.selected_index] = W.HTML(html.message(error))
        self.children = tabs

    @staticmethod
    def _stale(tab, source) -> bool:
        """Whether the tab must be made; one on another checkpoint is closed first."""
        if tab is not None and tab.source != source:
            tab.close()
            return True
        return tab is None

    def close(self) -> None:
        """Closes every tab and frees every model."""
        for tab in (self.explorer, self.comparison, self.generator):
            if tab is not None:
                tab.close()
        super().close()
