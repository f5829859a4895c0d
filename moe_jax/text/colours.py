"""Tokens coloured by their top expert, the one with the largest gate: on a terminal, and as one HTML file.

Legend: L MoE layers, N tokens, S slots, E experts, zero-computation ones after those that compute.
"""

import codecs
import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rich.text import Text


INK = "#111111"  # of the letters on every colour
NOBODY = "#bbbbbb"  # of a token that no expert took
RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
MOST_IN_LEGEND = 32  # experts that the terminal's legend names
HIDDEN = dict.fromkeys([*range(32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}") | {10: "\n", 9: "\t"}


class Traced(NamedTuple):
    """One text and the routing of its tokens.

    ids: token ids [N]. pieces: the bytes of each token. prompt: how many tokens are the prompt's.
    expert_ids: int [L, N, S]; E is an empty slot. gates: float [L, N, S], 0 in empty slots.
    """

    ids: Sequence[int]
    pieces: Sequence[bytes]
    prompt: int
    expert_ids: np.ndarray
    gates: np.ndarray


def top_experts(traced: Traced, num_experts: int) -> np.ndarray:
    """int [L, N]: the expert with the largest gate, the first of equals; -1 if no expert took the token."""
    gates = np.where(traced.expert_ids < num_experts, traced.gates, -np.inf)
    slot = gates.argmax(-1)[..., None]
    top = np.take_along_axis(traced.expert_ids, slot, -1)[..., 0]
    return np.where((traced.expert_ids < num_experts).any(-1), top, -1)


def shares(texts: Sequence[Traced], num_experts: int) -> np.ndarray:
    """float [L, E]: the share of all copies of these tokens that each expert of a layer took."""
    layers = len(texts[0].expert_ids)
    counts = np.zeros((layers, num_experts))
    for text in texts:
        for layer, ids in enumerate(text.expert_ids):
            counts[layer] += np.bincount(ids[ids < num_experts], minlength=num_experts)
    return counts / np.maximum(1, counts.sum(1, keepdims=True))


def letters(pieces: Iterable[bytes]) -> list[str]:
    """The characters to show for each token; a character of several tokens is shown with the last, and a bar before it.

    Control characters other than newline and tab become U+FFFD, so that no text moves the cursor or sets colours.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [printable(decoder.decode(piece)) for piece in pieces]
    return [text or "\N{LEFT ONE EIGHTH BLOCK}" for text in texts]


def printable(text: str) -> str:
    """The text without control characters, which would command a terminal."""
    return text.translate(HIDDEN)


# --- colours --------------------------------------------------------------------------------------------------


ONE_LIGHTNESS = 12  # up to this many colours
TWO_LIGHTNESSES = 36


def palette(num_colors: int) -> list[str]:
    """Colours "#rrggbb" that differ and suit dark letters: hues evenly around OKLCH's circle, in alternating lightness.

    A few have one lightness, more have two, and many three, so that neighbours in hue differ in lightness.
    """
    levels = [(0.82, 0.11)] if num_colors <= ONE_LIGHTNESS else [(0.88, 0.09), (0.72, 0.15)]
    levels += [(0.66, 0.09)] if num_colors > TWO_LIGHTNESSES else []
    hues = (360.0 * n / max(1, num_colors) + 20.0 for n in range(num_colors))
    return [oklch(*levels[n % len(levels)], hue) for n, hue in enumerate(hues)]


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of OKLCH (0 to 1, 0 to about 0.3, degrees) as sRGB "#rrggbb"; what sRGB lacks is clipped.

    Source: https://bottosson.github.io/posts/oklab/ (the matrices from OKLab to linear sRGB).
    """
    a = chroma * math.cos(math.radians(hue))
    b = chroma * math.sin(math.radians(hue))
    rows = ((0.39633778, 0.21580376), (-0.10556135, -0.06385417), (-0.08948418, -1.29148555))
    l_, m_, s_ = (lightness + x * a + y * b for x, y in rows)
    l, m, s = l_**3, m_**3, s_**3  # noqa: E741
    linear = (
        4.07674166 * l - 3.30771159 * m + 0.23096993 * s,
        -1.26843800 * l + 2.60975740 * m - 0.34131940 * s,
        -0.00419609 * l - 0.70341861 * m + 1.70761470 * s,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, x)))):02x}" for x in linear)


def _gamma(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055


# --- the terminal ---------------------------------------------------------------------------------------------


def on_terminal(texts: Sequence[Traced], layer: int, num_experts: int) -> "list[Text]":
    """Each text in colours, and the legend, for `rich`. Letters of one token share a background."""
    return [*(_coloured(text, layer, num_experts) for text in texts), _legend(texts, layer, num_experts)]


def _coloured(traced: Traced, layer: int, num_experts: int) -> "Text":
    from rich.text import Text

    colors = [*palette(num_experts), NOBODY]
    line = Text()
    tops = top_experts(traced, num_experts)[layer]
    for number, (text, top) in enumerate(zip(letters(traced.pieces), tops, strict=True)):
        if traced.pieces[number]:
            slant = "italic " if number < traced.prompt else ""
            line.append(text.replace("\n", f"{RETURN}\n"), f"{slant}{INK} on {colors[top]}")
    return line


def _legend(texts: Sequence[Traced], layer: int, num_experts: int) -> "Text":
    from rich.text import Text

    of_layer = shares(texts, num_experts)[layer]
    colors = palette(num_experts)
    used = [e for e in np.argsort(-of_layer, kind="stable") if of_layer[e]]
    line = Text(f"MoE layer {layer}, italic: the prompt; expert and its share of the copies: ")
    for expert in used[:MOST_IN_LEGEND]:
        line.append(f" {expert} ", f"{INK} on {colors[expert]}").append(f" {of_layer[expert]:.0%}  ")
    rest = [f"{len(used) - MOST_IN_LEGEND} more"] if len(used) > MOST_IN_LEGEND else []
    idle = [f"{num_experts - len(used)} unused"] if len(used) < num_experts else []
    return line.append(", ".join(rest + idle))


# --- HTML -----------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; margin: 1rem 0; }
.text span, .legend b { color: INK; border-radius: 3px; padding: 1px 0; }
.text span { box-shadow: inset -1px 0 rgba(0, 0, 0, 0.18); }
.text .given { font-style: italic; }
.text .line::before { content: "\\21b5"; opacity: 0.5; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 0.9rem; font-size: 13px; }
.legend b { display: inline-block; min-width: 2em; text-align: center; padding: 0 0.4em; }
"""

# no network, and only the script below may run
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const spans = document.querySelectorAll(".text span"), legend = document.querySelector(".legend");
const color = expert => expert < 0 ? data.nobody : data.colors[expert];
function show(layer) {
  spans.forEach((span, n) => { span.style.background = color(data.top[layer][n]); });
  legend.replaceChildren(...data.shares[layer].map((share, expert) => [share, expert])
    .sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(([share, expert]) => {
      const chip = document.createElement("b"), entry = document.createElement("span");
      chip.textContent = expert; chip.style.background = color(expert);
      entry.append(chip, " " + (100 * share).toFixed(1) + " %");
      return entry;
    }));
}
const choice = document.querySelector("select");
choice.addEventListener("change", () => show(choice.value));
show(choice.value);
"""


def as_html(texts: Sequence[Traced], layer: int, num_experts: int, title: str) -> str:
    """One self-contained page: coloured tokens, whose titles have id, experts and gates, and a choice of the layer.

    Args:
        texts: at least one, of one model.
        layer: the MoE layer that is shown first.
        num_experts: E.
        title: of the page.
    """
    layers = range(len(texts[0].expert_ids))
    chosen = "".join(f'<option value="{n}"{" selected" * (n == layer)}>{n}</option>' for n in layers)
    body = "\n".join(_as_spans(text, layer, num_experts) for text in texts)
    style = STYLE.replace("INK", INK)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>Each token has the colour of its top expert, with the largest gate, "
        f"in MoE layer <select>{chosen}</select>; the prompt is in italics. Point at a token to see the others.</p>\n"
        f"{body}\n<p>Experts and their share of the copies of these tokens:</p>\n<div class=legend></div>\n"
        f'<script type="application/json" id="data">{_data(texts, num_experts)}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _data(texts: Sequence[Traced], num_experts: int) -> str:
    """The data of the script: only numbers and colours."""
    value = {
        "top": np.concatenate([_visible(t, top_experts(t, num_experts)) for t in texts], 1).tolist(),
        "shares": shares(texts, num_experts).round(4).tolist(),
        "colors": palette(num_experts),
        "nobody": NOBODY,
    }
    return json.dumps(value, separators=(",", ":"))


def _visible(traced: Traced, values: np.ndarray) -> np.ndarray:
    """[L, N] of the tokens that have text."""
    return values[:, [bool(piece) for piece in traced.pieces]]


def _as_spans(traced: Traced, layer: int, num_experts: int) -> str:
    colors = [*palette(num_experts), NOBODY]
    tops = top_experts(traced, num_experts)[layer]
    spans = []
    for n, text in enumerate(letters(traced.pieces)):
        if traced.pieces[n]:
            kinds = " ".join(["given"] * (n < traced.prompt) + ["line"] * ("\n" in text))
            spans.append(
                f'<span class="{kinds}" style="background:{colors[tops[n]]}" '
                f'title="{html.escape(_title(traced, n, num_experts))}">{html.escape(text)}</span>'
            )
    return f'<div class="text">{"".join(spans)}</div>'


def _title(traced: Traced, n: int, num_experts: int) -> str:
    """Token id and bytes, then a line for each layer with experts and gates, the largest gate first."""
    lines = [f"token {traced.ids[n]} {traced.pieces[n]!r}"]
    for layer, (experts, gates) in enumerate(zip(traced.expert_ids[:, n], traced.gates[:, n], strict=True)):
        order = [s for s in np.argsort(-gates, kind="stable") if experts[s] < num_experts]
        taken = ", ".join(f"{experts[s]} ({gates[s]:.3f})" for s in order)
        lines.append(f"layer {layer}: {taken or 'no expert'}")
    return "\n".join(lines)
