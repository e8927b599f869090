"""The explorer: thin ipywidgets around the views, all on screen being a function of `self.record`.

    from dlr.explore.widgets import Explorer
    Explorer()                # the embedded router; Explorer(checkpoint="...") for another

Standard ipywidgets only. Moving the slider re-routes from kept logits at once; losses and times
follow when it rests.
"""

import asyncio
import functools

import ipywidgets as W

from dlr.explore import html
from dlr.explore.export import FORMATS, export
from dlr.explore.layout import Cost, Look
from dlr.explore.opening import sources
from dlr.explore.session import TURNS, Session
from dlr.explore.tokens import Words
from dlr.measure.record import Record
from dlr.routing.budget import DIAL

SETTLE = 0.4                     # seconds without a change before the slower step starts
EXAMPLES = {
    "prose and a name":
        "The old lighthouse keeper, Mr. Abernathy, climbed the stairs every evening at six. He lit "
        "the lamp, wrote one line in his book, and waited for the ships that no longer came.",
    "code":
        "def mean(values):\n    \"\"\"Returns the arithmetic mean of `values`.\"\"\"\n    "
        "total = 0.0\n    for value in values:\n        total += value\n    return total / "
        "len(values)",
    "documentation":
        "Parameters\n----------\nx : array_like, shape (n_samples, n_features)\n    The data to "
        "fit. If `None`, the default value is used.\n\nReturns\n-------\nself : object\n    "
        "Returns the instance itself.",
    "repetition":
        "one two three four one two three four one two three four one two three four",
    "numbers and rare words":
        "In 1987, 3,141 axolotls cost £59.26 each; the zeugma was antediluvian, the syzygy "
        "perspicuous.",
    "odd characters":
        "<script>alert('hi')</script> &lt;b&gt; \"quotes\"\ttab\n  two spaces, naïve café, 日本語, "
        "\N{FAMILY} \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}, "
        "\N{RIGHT-TO-LEFT MARK}שלום\N{LEFT-TO-RIGHT MARK} end.",
}
FIRST = EXAMPLES["prose and a name"]
WIDE = {"width": "98%"}


def guarded(method):
    """A handler whose exceptions show as a message in the view; the next input works again."""
    @functools.wraps(method)
    def inner(self, *args):
        try:
            return method(self, *args)
        except Exception as error:          # widgets swallow what is raised; it must be seen
            self.error = error
            self.view.value = html.message(error)
    return inner


class Quiet:
    """A short text in place of a widget, for pages and notebooks that do not run it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}: run this cell for the live view"


class Later:
    """Runs `action` once its inputs have rested; at once where no event loop runs (tests)."""

    def __init__(self, action, delay: float = SETTLE):
        self.action, self.delay, self.handle = action, delay, None

    def __call__(self, delay: float | None = None) -> None:
        self.cancel()
        delay = self.delay if delay is None else delay
        try:
            self.handle = asyncio.get_running_loop().call_later(delay, self.action)
        except RuntimeError:
            self.action()

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


def labelled(widget, label: str):
    """`widget` with a visible label above it."""
    return W.VBox([W.Label(label, style={"font_weight": "bold", "font_size": "12px"}), widget])


def column(width: str, *children):
    """Widgets above each other; a pair is a widget and its label."""
    return W.VBox([labelled(*child) if isinstance(child, tuple) else child for child in children],
                  layout={"width": width})


def text_area(text: str, tip: str, height: str = "104px") -> W.Textarea:
    return W.Textarea(text, placeholder="Type any text", layout=WIDE | {"height": height},
                      tooltip=tip)


def view_area() -> W.HTML:
    return W.HTML(layout={"width": "auto", "margin": "6px 0"})


def budget_slider(session: Session) -> W.IntSlider:
    return W.IntSlider(value=round(100 * session.calibrated), min=0, max=round(100 * DIAL[-1]),
                       readout_format="d", layout=WIDE,
                       tooltip="budget: share of routable gates to skip, percent")


class Explorer(Quiet, W.VBox):
    """Any text in, the pattern out.

    Args:
        checkpoint: folder or label of a checkpoint; the embedded router by default.
        text: what to show first.
        session: a session to share; the explorer then does not close it.
        base: of the first session; loading: dtype, device and load_in_4bit of every checkpoint
            opened here, see `dlr.explore.session.Session`.
    """

    def __init__(self, checkpoint=None, text: str | None = None, session: Session | None = None,
                 base: str | None = None, **loading):
        self.error: Exception | None = None
        self.record: Record | None = None
        self.words: Words | None = None
        self.cost: Cost | None = None
        self._turns: list[dict[str, float]] = []
        self._owned = session is None
        self._quiet = False
        self._loading = loading
        self.session = session or Session(checkpoint, base, **loading)
        self._build(FIRST if text is None else text)
        self._read_later = Later(self.read)
        self._settle_later = Later(self.settle)
        self._time_later = Later(self.measure)
        super().__init__([self.controls, self.downloads, self.view], layout={"width": "100%"})
        self.text.observe(lambda _: self._read_later(), "value")
        self.budget.observe(lambda _: self.reroute(), "value")
        self.layers.observe(lambda _: self.show(), "value")
        self.shade.observe(lambda _: self.show(), "value")
        self.example.observe(self._pick_example, "value")
        self.picker.observe(self._pick_checkpoint, "value")
        self.save.on_click(lambda _: self.export())
        self.read()

    def _build(self, text: str) -> None:
        last = len(self.session.routing.layers) - 1
        self.text = text_area(text, "text to explore")
        self.example = W.Dropdown(options=[("choose an example", ""), *EXAMPLES.items()],
                                  layout=WIDE)
        self._sources = sources(self.session.name, self.session.source)
        self.picker = W.Dropdown(options=list(self._sources), value=self.session.name, layout=WIDE,
                                 disabled=not self._owned, tooltip="checkpoint")
        self.budget = budget_slider(self.session)
        self.layers = W.IntRangeSlider(value=(0, last), min=0, max=last, layout=WIDE,
                                       tooltip="layers shown and counted")
        self.shade = W.ToggleButtons(options=[("this text's range", True), ("all depths", False)],
                                     style={"button_width": "118px"})
        self.formats = W.Dropdown(options=[("all formats", FORMATS), ("HTML page", ("html",)),
                                           ("PNG and PDF", ("png", "pdf")),
                                           ("CSV and JSON", ("csv", "json"))],
                                  layout={"width": "140px"})
        self.save = W.Button(description="Export", icon="download", layout={"width": "100px"},
                             tooltip="write the view to files")
        self.downloads, self.view = W.HTML(), view_area()
        self.controls = W.HBox([
            column("46%", (self.text, "Text"), (self.example, "Examples")),
            column("27%", (self.budget, "Budget: gates to skip, %"), (self.layers, "Layers shown")),
            column("27%", (self.picker, "Checkpoint"), (self.shade, "Shade"),
                   W.HBox([self.formats, self.save]))], layout={"width": "100%"})

    @property
    def look(self) -> Look:
        return Look(*self.layers.value, fit=self.shade.value)

    @property
    def note(self) -> str:
        """What the reader must know about this text and checkpoint."""
        empty = "Type some text: an empty one holds its opening token only."
        notes = [self.session.note, "" if self.text.value else empty, self.session.cut(self.record)]
        return " ".join(filter(None, notes))

    # -- record -> view ---------------------------------------------------------------------------
    @guarded
    def read(self) -> None:
        """Reads the text anew: both models, the plan at the slider's budget, then times."""
        for later in (self._read_later, self._settle_later, self._time_later):
            later.cancel()
        self.record = None              # after an error nothing is shown, least of all another text
        threshold = self.session.threshold(self.budget.value / 100)
        self.record = self.session.read(self.text.value, threshold=threshold, longest=html.LONGEST)
        self.words = Words(self.record)
        self.cost = self.session.flops(self.record)
        self.show()
        self._time_anew()

    @guarded
    def reroute(self) -> None:
        """Another budget, from the kept logits; losses and times follow when the slider rests."""
        if self._quiet:
            return
        if self.record is None:
            self.read()
            return
        self.record = self.session.at_skip(self.record, self.budget.value / 100)
        self.cost = self.session.flops(self.record)
        self._time_later.cancel()
        self.show()
        self._settle_later()

    @guarded
    def settle(self) -> None:
        """Losses at the slider's budget; times follow."""
        self.record = self.session.losses(self.record)
        self.show()
        self._time_anew()

    def _time_anew(self) -> None:
        self._turns = []
        self._time_later()

    @guarded
    def measure(self) -> None:
        """Times the text once; numbers show after three turns. Input between turns goes first."""
        self._time_later.cancel()
        self._turns.append(self.session.turn(self.record))
        if len(self._turns) < TURNS:
            self._time_later(0.01)
        else:
            self.cost = self.session.cost(self.record, self._turns)
            self.show()

    @guarded
    def show(self) -> None:
        """Draws the record."""
        if self.record is not None:
            self.view.value = html.view(self.record, self.cost, self.look, self.note, self.words)
            self.error = None

    # -- controls ---------------------------------------------------------------------------------
    def _pick_example(self, change) -> None:
        if change["new"]:
            self.text.value = change["new"]

    @guarded
    def _pick_checkpoint(self, change) -> None:
        if self._quiet:
            return
        before = self.session
        self._quiet = True                                  # what is set here is nobody's input
        try:
            try:
                self.session = Session(*self._sources[change["new"]], **self._loading)
            except Exception:
                self.picker.value = before.name             # the model is still that one
                raise
            before.close()
            last = len(self.session.routing.layers) - 1
            self.layers.max = last
            self.layers.value = (0, last)
            self.budget.value = round(100 * self.session.calibrated)
        finally:
            self._quiet = False
        self.read()

    def export(self, folder=None) -> list:
        """Writes the view; the links below it save the same files from the browser."""
        try:
            if self.record is not None and self.text.value != self.record.meta["text"]:
                self.read()
            elif self.record is not None and self.record.loss_routed[:-1].isnan().any():
                self.settle()
            if self.record is None or self.error is not None:
                raise ValueError("There is nothing to export: the view shows an error.")
            paths = export(self.record, self.view.value, folder, self.cost, self.look,
                           self.formats.value)
        except Exception as error:
            self.downloads.value = html.message(error)
            return []
        self.downloads.value = html.saved(paths)
        return paths

    def close(self) -> None:
        """Closes the widgets and frees the model: hooks, router and adapters come off."""
        for later in (self._read_later, self._settle_later, self._time_later):
            later.cancel()
        if self._owned:
            self.session.close()
        super().close()
