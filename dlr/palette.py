"""Colours and the style sheet of the explorer's views.

One cividis ramp (Nuñez et al. 2018, made for colour-blind readers), cut at its dark end, with black or white text by
contrast on every step; a second, lighter cut where the page is dark. Depth is always given as a number as well.
"""

from functools import lru_cache

LEVELS = 21                     # steps of the ramp; classes dlr-l0 (few layers) to dlr-l20 (many)
RUN_A, RUN_B = "#D55E00", "#0072B2"          # only the first, only the second of two plans (Okabe-Ito)
# Cividis at 0, 1/16, ... 1.
_STOPS = ("#00224e", "#00306f", "#123570", "#2c416e", "#3e4c6c", "#4e576c", "#5d636e", "#6c6e72", "#7c7b78", "#8a8779",
          "#999478", "#a9a175", "#baaf71", "#ccbd69", "#decc5e", "#f1dc4c", "#fee838")


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def cividis(x: float) -> str:
    """The colour at `x`, 0 to 1."""
    place = min(max(x, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    pair = zip(_rgb(_STOPS[low]), _rgb(_STOPS[low + 1]))
    return "#" + "".join(f"{round(a + (place - low) * (b - a)):02x}" for a, b in pair)


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    parts = [c / 255 for c in _rgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever reads better on `background`."""
    return max("#000000", "#ffffff", key=lambda c: contrast(c, background))


def ramp(dark: bool = False) -> list[str]:
    """LEVELS colours, few layers to many."""
    start = 0.26 if dark else 0.0
    return [cividis(start + (1 - start) * i / (LEVELS - 1)) for i in range(LEVELS)]


def _ramp_css(prefix: str, dark: bool) -> str:
    return "".join(f"{prefix} .dlr-l{i}{{--c:{c};--t:{ink(c)}}}" for i, c in enumerate(ramp(dark)))


LIGHT = "--bg:#fff;--fg:#1b1f24;--muted:#59636e;--line:#d1d9e0;--faint:#edf0f3;--kept:#aeb7c0;--card:#f6f8fa"
DARK = "--bg:#15191e;--fg:#e6eaef;--muted:#a3adb8;--line:#39424c;--faint:#262d35;--kept:#66717d;--card:#1d232a"
_RULES = """
.dlr{background:var(--bg);color:var(--fg);font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
 border:1px solid var(--line);border-radius:10px;padding:16px 18px;box-sizing:border-box;text-align:left}
.dlr *{box-sizing:border-box}
.dlr h4{font-size:13px;font-weight:600;margin:0 0 8px;color:var(--fg);line-height:1.3}
.dlr-by{margin:8px 2px 12px}
.dlr small,.dlr-muted,.dlr-by{color:var(--muted);font-size:12px;font-weight:400}
.dlr-tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 16px}
.dlr-tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 12px;min-width:0}
.dlr-tile span,.dlr-tile small{display:block}
.dlr-tile span{font-size:12px;color:var(--muted)}
.dlr-tile b{font-size:20px;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums;white-space:nowrap}
.dlr-main{position:relative;padding-right:352px;min-height:132px;margin-bottom:18px}
.dlr-strip{font-size:17px;line-height:2.05;max-height:390px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}
.dlr-t{background:var(--c);color:var(--t);border-radius:3px;padding:2px 2px 3px;margin-right:1px;
 box-decoration-break:clone;-webkit-box-decoration-break:clone;cursor:help;outline:0}
.dlr-t>bdi{unicode-bidi:isolate}
.dlr-t sub{font-size:10px;line-height:0;vertical-align:-3px;opacity:.92;padding-left:1px;font-variant-numeric:tabular-nums}
.dlr-t:hover,.dlr-t:focus{outline:2px solid var(--fg);outline-offset:0}
.dlr-t.dlr-x{text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px}
.dlr-card{position:absolute;top:0;right:0;width:336px;max-height:460px;overflow:auto;background:var(--card);color:var(--fg);
 border:1px solid var(--line);border-radius:8px;padding:12px 14px;font-size:12.5px;line-height:1.45;white-space:normal}
.dlr-t>.dlr-card{display:none;z-index:2;cursor:default;box-shadow:0 6px 22px #0005}
.dlr-t:hover>.dlr-card{display:block;z-index:3}
.dlr-t:focus>.dlr-card{display:block}
.dlr-card q{font-size:18px;font-weight:600;quotes:"“" "”";overflow-wrap:anywhere}
.dlr-card table{border-collapse:collapse;width:100%;margin:6px 0 0;font-size:12.5px;background:none;color:inherit}
.dlr-card td,.dlr-card th{padding:1px 6px 1px 0;text-align:left;vertical-align:top;border:0;background:none;font-weight:400;
 color:inherit}
.dlr-card th{color:var(--muted);white-space:nowrap;padding-right:12px}
.dlr-card .n{text-align:right;font-variant-numeric:tabular-nums}
.dlr-card code,.dlr-heat bdi{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:none;color:inherit;
 padding:0;border:0}
.dlr-card code{font-size:12px;overflow-wrap:anywhere}
.dlr-key{display:flex;flex-wrap:wrap;gap:2px 10px;align-items:center;margin:8px 0 0;font-size:12px;color:var(--muted)}
.dlr-key i{display:inline-block;min-width:22px;padding:0 4px;text-align:center;font-style:normal;border-radius:3px;
 background:var(--c);color:var(--t);font-variant-numeric:tabular-nums;margin-right:2px}
.dlr-heat{max-height:620px;overflow:auto;padding-top:2px;contain:inline-size}
.dlr-row{display:flex;width:max-content;margin-bottom:12px}
.dlr-c{flex:0 0 auto;min-width:21px;text-align:center;margin-right:1px;padding:0}
.dlr-c bdi{display:block;font-size:12px;line-height:19px;height:19px;white-space:pre;padding:0 1px}
.dlr-c svg{display:block;width:100%;background:var(--faint)}
.dlr-c .r{fill:var(--c);stroke:var(--muted);stroke-width:.7;vector-effect:non-scaling-stroke}
.dlr-c .k{fill:var(--kept)}
.dlr-c .a{fill:#D55E00}
.dlr-c .b{fill:#0072B2}
.dlr-c b{display:block;font-size:10.5px;font-weight:400;line-height:15px;height:15px;background:var(--c);color:var(--t);
 font-variant-numeric:tabular-nums}
.dlr-axis{flex:0 0 auto;padding-top:19px;color:var(--muted)}
.dlr-axis svg{display:block}
.dlr-axis text{font:9.5px system-ui,"DejaVu Sans",sans-serif;fill:var(--muted)}
.dlr-axis rect{fill:var(--muted)}
.dlr-axis small{display:block;font-size:10px;line-height:15px;height:15px;text-align:right;padding-right:4px}
.dlr-note{border-left:3px solid #E69F00;padding:4px 10px;margin:0 0 12px;background:var(--card);color:var(--fg)}
.dlr-error{border-left:4px solid #D55E00;padding:8px 12px;background:var(--card);color:var(--fg);white-space:pre-wrap;
 overflow-wrap:anywhere}
.dlr-two{display:grid;grid-template-columns:1fr 1fr;gap:18px;margin-bottom:16px}
.dlr-two .dlr-main{padding-right:0;min-height:0;margin:0}
.dlr-two .dlr-card{position:static;width:auto;height:auto;margin:6px 0}
.dlr-two .dlr-strip{position:relative}
.dlr-two .dlr-t>.dlr-card{position:absolute;left:0;right:0;top:auto;width:336px}
.dlr-sums{border-collapse:collapse;margin:0 0 16px;font-size:13px;font-variant-numeric:tabular-nums}
.dlr .dlr-sums td,.dlr .dlr-sums th{padding:4px 14px 4px 0;border:0;border-bottom:1px solid var(--line);text-align:right;
 background:none;color:var(--fg);font-size:13px}
.dlr .dlr-sums th{color:var(--muted);font-weight:400}
.dlr .dlr-sums td:first-child,.dlr .dlr-sums th:first-child{text-align:left}
.dlr-swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px;vertical-align:-1px}
@media (max-width:820px){.dlr-main{padding-right:0}.dlr-main>.dlr-card,.dlr-t>.dlr-card{position:static;width:auto;height:auto}
 .dlr-two{grid-template-columns:1fr}}
@media print{.dlr-strip,.dlr-heat{max-height:none}}
"""


@lru_cache(maxsize=1)
def stylesheet() -> str:
    """The one style sheet of all views: constant, so that two views in one page cannot disturb each other.

    Dark where JupyterLab or Voilà say so, and in an exported page (class dlr-page) where the system does.
    """
    dark = 'body[data-jp-theme-light="false"] '
    system = f"{_scoped('.dlr-page .dlr', DARK)}{_ramp_css('.dlr-page', True)}"
    return (_scoped(".dlr", LIGHT) + _ramp_css(".dlr", False) + _scoped(f"{dark}.dlr", DARK)
            + _ramp_css(dark.strip(), True) + _RULES + f"@media (prefers-color-scheme:dark){{{system}}}")


def _scoped(selector: str, variables: str) -> str:
    return f"{selector}{{{variables}}}"
